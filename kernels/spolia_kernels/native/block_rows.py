"""Attention of many rows over shared keys, as one pass: scores, exponentials and weighted values of a tile of keys
while it is in the nearest cache.

    S[j] = sum_d K[j, d] · Q[d];   m' = max(m, max_j S[j]);   P[j] = 2^(S[j] - m')
    l = l · 2^(m - m') + sum_j P[j];   O[e] = O[e] · 2^(m - m') + sum_j V[j, e] · P[j]

Vectors run over rows, one query a lane, so nothing is ever summed across a vector: a key or value is read as one
number, as it lies, and multiplied with as many queries as a register holds. Both products are the same loop, with eight
keys (or eight dimensions) times two vectors in registers. Queries are transposed on their way in, outputs on their way
out, by the thread that uses them. Eight keys at a time are read across, not along, and no processor foresees that: so
while a tile is multiplied the next one is asked for, line by line (32 rows over 4,096 keys of 8 heads from memory, a
thread: 3.8 → 2.7 ms). What a lane computes does not depend on the others: a row gets the same bits whoever
is attended beside it.

Source: FlashAttention (arXiv 2205.14135) §3.1; Hydragen (arXiv 2402.05099) §3.2, all rows' queries in one product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spolia_kernels.native.number_table import LN_2, LOWEST
from spolia_kernels.native.rows import Keys, Rows
from spolia_kernels.native.tasks import TILE
from spolia_kernels.native.vectors import I64, Value, Vectors

Group = Callable[[Value, int, list[Value]], Sequence[Value]]
"""Given the first of so many neighbours and the carried values, returns their next ones."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """What registers hold: `num_vectors` of rows times `num_keys` keys, or `num_dims` dimensions of values."""

    lanes: int
    num_vectors: int
    num_keys: int
    num_dims: int

    @property
    def block_rows(self) -> int:
        """Rows that are computed together."""
        return self.lanes * self.num_vectors


class BlockRows:
    """Builds the attention of up to `most_rows` rows, in blocks. `room` is a thread's own, `room_of` says how much."""

    def __init__(self, vectors: Vectors, tiling: Tiling, room: Value, most_rows: Value, head_dim: Value, v_dim: Value):
        self.v = vectors
        self.tiling = tiling
        self.head_dim, self.v_dim = head_dim, v_dim
        build = vectors.builder
        padded = build.mul(self._blocks_of(most_rows), I64(tiling.block_rows))
        self._queries = room  # blocks of [dims, block_rows], as are the others
        self._outs = build.gep(self._queries, [build.mul(padded, head_dim)])
        self._tops = build.gep(self._outs, [build.mul(padded, v_dim)])
        self._sums = build.gep(self._tops, [padded])
        self._scores = build.gep(self._sums, [padded])

    def attend(self, rows: Rows, keys: Keys) -> None:
        """Rows over keys, at least one of both."""
        zero, each = I64(0), self.v.loop
        blocks = self._blocks_of(rows.count)
        each(zero, blocks, 1, [], lambda block, _: self._begin(block, rows))
        each(zero, keys.count, TILE, [], lambda start, _: self._tile(keys, start, blocks))
        each(zero, blocks, 1, [], lambda block, _: self._end(block, rows))

    def _of_block(self, base: Value, block: Value, dims: Value | None = None) -> Value:
        build = self.v.builder
        size = build.mul(block, I64(self.tiling.block_rows))
        return build.gep(base, [size if dims is None else build.mul(size, dims)])

    def _lanes_of(self, base: Value, line: Value) -> list[Value]:
        """The vectors of a block's line."""
        return [self.v.load_vector(base, index) for index in self._line(line)]

    def _put_lanes(self, vectors: Sequence[Value], base: Value, line: Value) -> None:
        for vector, index in zip(vectors, self._line(line), strict=True):
            self.v.store_vector(vector, base, index)

    def _line(self, line: Value) -> list[Value]:
        first = self.v.builder.mul(line, I64(self.tiling.block_rows))
        return [self.v.builder.add(first, I64(n * self.tiling.lanes)) for n in range(self.tiling.num_vectors)]

    def _blocks_of(self, rows: Value) -> Value:
        size = self.tiling.block_rows
        return self.v.builder.sdiv(self.v.builder.add(rows, I64(size - 1)), I64(size))

    def _begin(self, block: Value, rows: Rows) -> Sequence[Value]:
        """Queries of a block, scaled and turned on their side; rows past the last repeat it. Nothing seen yet."""
        build, v, size = self.v.builder, self.v, I64(self.tiling.block_rows)
        target = self._of_block(self._queries, block, self.head_dim)
        first, last = build.mul(block, size), build.sub(rows.count, I64(1))

        def row(r: Value, _: list[Value]) -> Sequence[Value]:
            def write(d: Value, number: Value) -> None:
                v.store(number, target, build.add(build.mul(d, size), r))

            rows.read_query(v, v.smaller_int(build.add(first, r), last), self.head_dim, write)
            return []

        v.loop(I64(0), size, 1, [], row)
        nothing = [v.zero] * self.tiling.num_vectors
        out = self._of_block(self._outs, block, self.v_dim)

        def clear(e: Value, _: list[Value]) -> Sequence[Value]:
            self._put_lanes(nothing, out, e)
            return []

        v.loop(I64(0), self.v_dim, 1, [], clear)
        self._put_lanes([v.number(LOWEST)] * self.tiling.num_vectors, self._of_block(self._tops, block), I64(0))
        self._put_lanes(nothing, self._of_block(self._sums, block), I64(0))
        return []

    def _tile(self, keys: Keys, start: Value, blocks: Value) -> Sequence[Value]:
        tile = keys.part(self.v, start, TILE)
        return self.v.loop(I64(0), blocks, 1, [], lambda block, _: self._block_tile(block, tile))

    def _block_tile(self, block: Value, tile: Keys) -> Sequence[Value]:
        """A block's rows over a tile's keys."""
        build, v = self.v.builder, self.v
        tops_at, sums_at = self._of_block(self._tops, block), self._of_block(self._sums, block)
        out = self._of_block(self._outs, block, self.v_dim)
        before = self._lanes_of(tops_at, I64(0))
        # The first block asks for the next tile: more of it with every dimension that it multiplies.
        asks = build.and_(build.icmp_signed("==", block, I64(0)), build.icmp_signed(">", tile.following, I64(0)))
        tops = self._all_scores(self._of_block(self._queries, block, self.head_dim), tile, before, asks)
        grown = [build.fcmp_ordered(">", top, old) for top, old in zip(tops, before, strict=True)]
        is_grown = v.any(grown[0])
        for flags in grown[1:]:
            is_grown = build.or_(is_grown, v.any(flags))
        with build.if_then(is_grown):
            shrink = [v.exp2(build.fsub(old, top)) for top, old in zip(tops, before, strict=True)]
            self._shrink_line(sums_at, I64(0), shrink)
            v.loop(I64(0), self.v_dim, 1, [], lambda e, _: self._shrink_line(out, e, shrink))
        self._put_lanes(tops, tops_at, I64(0))

        def weigh(j: Value, sums: list[Value]) -> Sequence[Value]:
            weights = [
                v.exp2(build.fsub(score, top)) for score, top in zip(self._lanes_of(self._scores, j), tops, strict=True)
            ]
            self._put_lanes(weights, self._scores, j)
            return [build.fadd(total, weight) for total, weight in zip(sums, weights, strict=True)]

        self._put_lanes(v.loop(I64(0), tile.count, 1, self._lanes_of(sums_at, I64(0)), weigh), sums_at, I64(0))
        self._in_groups(self.v_dim, self.tiling.num_dims, [], lambda e, size, _: self._add_values(out, tile, e, size))
        return []

    def _shrink_line(self, base: Value, line: Value, by: Sequence[Value]) -> Sequence[Value]:
        build = self.v.builder
        self._put_lanes([build.fmul(x, s) for x, s in zip(self._lanes_of(base, line), by, strict=True)], base, line)
        return []

    def _all_scores(self, queries: Value, tile: Keys, tops: Sequence[Value], asks: Value) -> list[Value]:
        """Scores of a tile into `self._scores`; the largest so far."""

        def some(first: Value, size: int, tops: list[Value]) -> Sequence[Value]:
            build, v, num = self.v.builder, self.v, self.tiling.num_vectors
            rows = [tile.key_at(v, build.add(first, I64(j))) for j in range(size)]
            # As many floats of the next tile's keys, and of its values, as are multiplied here: `size` a dimension.
            ahead = build.add(first, I64(TILE))
            soon = tile.key_at(v, ahead), tile.value_at(v, ahead)
            step = build.select(asks, I64(size), I64(0))

            def dim(d: Value, sums: list[Value]) -> Sequence[Value]:
                for address in soon:
                    v.prefetch(address, build.mul(d, step))
                query = self._lanes_of(queries, d)
                numbers = [v.splat(v.load(row, d)) for row in rows]
                return [v.fma(numbers[j], query[n], sums[j * num + n]) for j in range(size) for n in range(num)]

            scores = v.loop(I64(0), self.head_dim, 1, [v.zero] * (size * num), dim)
            for j in range(size):
                line = scores[j * num : (j + 1) * num]
                self._put_lanes(line, self._scores, build.add(first, I64(j)))
                tops = [v.larger(score, top) for score, top in zip(line, tops, strict=True)]
            return tops

        return self._in_groups(tile.count, self.tiling.num_keys, tops, some)

    def _add_values(self, out: Value, tile: Keys, first: Value, size: int) -> Sequence[Value]:
        """`size` dimensions of the values of a tile, weighted, onto the outputs."""
        build, v, num = self.v.builder, self.v, self.tiling.num_vectors
        dims = [build.add(first, I64(e)) for e in range(size)]

        def one(j: Value, sums: list[Value]) -> Sequence[Value]:
            weights = self._lanes_of(self._scores, j)
            row = tile.value_at(v, j)
            numbers = [v.splat(v.load(row, e)) for e in dims]
            return [v.fma(numbers[e], weights[n], sums[e * num + n]) for e in range(size) for n in range(num)]

        sums = v.loop(I64(0), tile.count, 1, [x for e in dims for x in self._lanes_of(out, e)], one)
        for index, e in enumerate(dims):
            self._put_lanes(sums[index * num : (index + 1) * num], out, e)
        return []

    def _in_groups(self, count: Value, size: int, carried: Sequence[Value], body: Group) -> list[Value]:
        """`body(first, size, carried)` for whole groups, then for what is left one by one."""
        build = self.v.builder
        whole = build.mul(build.sdiv(count, I64(size)), I64(size))
        carried = self.v.loop(I64(0), whole, size, carried, lambda i, values: body(i, size, values))
        return self.v.loop(whole, count, 1, carried, lambda i, values: body(i, 1, values))

    def _end(self, block: Value, rows: Rows) -> Sequence[Value]:
        """What was asked for: outputs over their sums, by row, and the log of the sums."""
        build, v, size = self.v.builder, self.v, I64(self.tiling.block_rows)
        tops_at, sums_at = self._of_block(self._tops, block), self._of_block(self._sums, block)
        outs = self._of_block(self._outs, block, self.v_dim)
        tops, sums = self._lanes_of(tops_at, I64(0)), self._lanes_of(sums_at, I64(0))
        logs = [
            build.fmul(build.fadd(top, v.log2(total)), v.number(LN_2)) for top, total in zip(tops, sums, strict=True)
        ]
        self._put_lanes(logs, tops_at, I64(0))
        first = build.mul(block, size)
        count = v.smaller_int(size, build.sub(rows.count, first))

        def row(r: Value, _: list[Value]) -> Sequence[Value]:
            target = build.add(first, r)
            v.store(v.load(tops_at, r), rows.lse(target), I64(0))
            whole = build.fdiv(v.scalar(1.0), v.load(sums_at, r))
            line = rows.out(target)

            def dim(e: Value, _: list[Value]) -> Sequence[Value]:
                v.store(build.fmul(v.load(outs, build.add(build.mul(e, size), r)), whole), line, e)
                return []

            return v.loop(I64(0), self.v_dim, 1, [], dim)

        return v.loop(I64(0), count, 1, [], row)
