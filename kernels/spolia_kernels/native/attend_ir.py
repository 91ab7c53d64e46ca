"""Attention of a few hundred rows over shared keys, as one pass: scores, exponentials and weighted values of a tile of
keys while it is in the nearest cache.

    S[j] = sum_d K[j, d] · Q[d];   m' = max(m, max_j S[j]);   P[j] = 2^(S[j] - m')
    l = l · 2^(m - m') + sum_j P[j];   O[e] = O[e] · 2^(m - m') + sum_j V[j, e] · P[j]

Vectors run over rows, one query a lane, so nothing is ever summed across a vector: a key or value is read as one
number, as it lies, and multiplied with as many queries as a register holds. Both products are the same loop, with eight
keys (or eight dimensions) times two vectors in registers. Queries are transposed on their way in, outputs on their way
out, by the thread that uses them. What a lane computes does not depend on the others: a row gets the same bits whoever
is attended beside it.

Threads take (KV head, chunk of rows, cut of keys) items from a counter, so one that was interrupted leaves the rest to
the others.

Source: FlashAttention (arXiv 2205.14135) §3.1; Hydragen (arXiv 2402.05099) §3.2, all rows' queries in one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from spolia_kernels.native.attend_task import FIELDS, TILE
from spolia_kernels.native.number_table import LN_2, LOWEST, NUMBERS
from spolia_kernels.native.vectors import FLOATS, I64, Value, Vectors


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


def attend_module(tiling: Tiling) -> ir.Module:
    """A module of one function, `task(fields)`, that a thread runs until no item is left."""
    module = ir.Module("attend")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64.as_pointer()]), "task")
    _Task(Vectors(module, function, tiling.lanes), tiling, function.args[0]).build()
    return module


class _Task:
    def __init__(self, vectors: Vectors, tiling: Tiling, fields: Value) -> None:
        self.v = vectors
        self.build_ = vectors.builder
        self.tiling = tiling
        self.fields = fields
        self.zero = I64(0)

    def field(self, name: str) -> Value:
        build = self.build_
        return build.load(build.gep(self.fields, [I64(FIELDS.index(name))]))

    def floats(self, name: str) -> Value:
        return self.build_.inttoptr(self.field(name), FLOATS)

    def counted(self, name: str) -> Value:
        place = self.build_.gep(self.fields, [I64(FIELDS.index(name))])
        return self.build_.atomic_rmw("add", place, I64(1), "monotonic")

    def build(self) -> None:
        build, v, tiling = self.build_, self.v, self.tiling
        numbers = self.floats("numbers")
        v.read_numbers(numbers)
        self.scale = v.load(numbers, I64(len(NUMBERS)))
        self.head_dim, self.v_dim = self.field("head_dim"), self.field("v_dim")
        self.key_token, self.value_token = self.field("key_token"), self.field("value_token")
        room = self.at(self.floats("room"), build.mul(self.counted("next_thread"), self.field("room_floats")))
        # Blocks of rows of a chunk, each [dims, block_rows].
        blocks = self.blocks_of(self.field("chunk_rows"))
        padded = build.mul(blocks, I64(tiling.block_rows))
        self.queries = room
        self.outs = self.at(self.queries, build.mul(padded, self.head_dim))
        self.tops = self.at(self.outs, build.mul(padded, self.v_dim))
        self.sums = self.at(self.tops, padded)
        self.scores = self.at(self.sums, padded)
        num_items = self.field("num_items")
        again = build.append_basic_block()
        work, done = build.append_basic_block(), build.append_basic_block()
        build.branch(again)
        build.position_at_end(again)
        item = self.counted("next_item")
        build.cbranch(build.icmp_signed("<", item, num_items), work, done)
        build.position_at_end(work)
        self.item(item)
        build.branch(again)
        build.position_at_end(done)
        build.ret_void()

    def at(self, base: Value, index: Value) -> Value:
        return self.build_.gep(base, [index])

    def blocks_of(self, rows: Value) -> Value:
        size = self.tiling.block_rows
        return self.build_.sdiv(self.build_.add(rows, I64(size - 1)), I64(size))

    def item(self, item: Value) -> None:
        build = self.build_
        num_heads, num_chunks = self.field("num_heads"), self.field("num_chunks")
        head, rest = build.srem(item, num_heads), build.sdiv(item, num_heads)
        chunk, cut = build.srem(rest, num_chunks), build.sdiv(rest, num_chunks)
        first_row = build.mul(chunk, self.field("chunk_rows"))
        first_key = build.mul(cut, self.field("cut_keys"))
        rows = self.v.smaller_int(self.field("chunk_rows"), build.sub(self.field("num_rows"), first_row))
        keys = self.v.smaller_int(self.field("cut_keys"), build.sub(self.field("num_keys"), first_key))
        query = self.moved("query", (head, "query_head"), (first_row, "query_row"))
        self.key = self.moved("key", (head, "key_head"), (first_key, "key_token"))
        self.value = self.moved("value", (head, "value_head"), (first_key, "value_token"))
        line = build.add(
            build.mul(build.add(build.mul(cut, num_heads), head), self.field("num_rows")), first_row
        )  # of [cuts, num_heads, num_rows]
        blocks = self.blocks_of(rows)
        self.v.loop(self.zero, blocks, 1, [], lambda block, _: self.begin(query, block, rows))
        self.v.loop(self.zero, keys, TILE, [], lambda start, _: self.tile(start, keys, blocks))
        out = self.at(self.floats("out"), build.mul(line, self.v_dim))
        lse = self.at(self.floats("lse"), line)
        self.v.loop(self.zero, blocks, 1, [], lambda block, _: self.end(block, rows, out, lse))

    def moved(self, name: str, *steps: tuple[Value, str]) -> Value:
        address = self.floats(name)
        for count, stride in steps:
            address = self.at(address, self.build_.mul(count, self.field(stride)))
        return address

    def of_block(self, base: Value, block: Value, dims: Value | None = None) -> Value:
        size = self.build_.mul(block, I64(self.tiling.block_rows))
        return self.at(base, size if dims is None else self.build_.mul(size, dims))

    def lanes_of(self, base: Value, line: Value) -> list[Value]:
        """The vectors of a block's line."""
        return [self.v.load_vector(base, index) for index in self.line(line)]

    def put_lanes(self, vectors: Sequence[Value], base: Value, line: Value) -> None:
        for vector, index in zip(vectors, self.line(line), strict=True):
            self.v.store_vector(vector, base, index)

    def line(self, line: Value) -> list[Value]:
        first = self.build_.mul(line, I64(self.tiling.block_rows))
        return [self.build_.add(first, I64(n * self.tiling.lanes)) for n in range(self.tiling.num_vectors)]

    def begin(self, query: Value, block: Value, rows: Value) -> Sequence[Value]:
        """Queries of a block, scaled and turned on their side; rows past the last repeat it. Nothing seen yet."""
        build, v, size = self.build_, self.v, I64(self.tiling.block_rows)
        target = self.of_block(self.queries, block, self.head_dim)
        first, last = build.mul(block, size), build.sub(rows, I64(1))
        query_row = self.field("query_row")

        def row(r: Value, _: list[Value]) -> Sequence[Value]:
            source = self.at(query, build.mul(v.smaller_int(build.add(first, r), last), query_row))

            def dim(d: Value, _: list[Value]) -> Sequence[Value]:
                v.store(build.fmul(v.load(source, d), self.scale), target, build.add(build.mul(d, size), r))
                return []

            return v.loop(self.zero, self.head_dim, 1, [], dim)

        v.loop(self.zero, size, 1, [], row)
        nothing = [v.zero] * self.tiling.num_vectors
        out = self.of_block(self.outs, block, self.v_dim)

        def clear(e: Value, _: list[Value]) -> Sequence[Value]:
            self.put_lanes(nothing, out, e)
            return []

        v.loop(self.zero, self.v_dim, 1, [], clear)
        self.put_lanes([v.number(LOWEST)] * self.tiling.num_vectors, self.of_block(self.tops, block), self.zero)
        self.put_lanes(nothing, self.of_block(self.sums, block), self.zero)
        return []

    def tile(self, start: Value, keys: Value, blocks: Value) -> Sequence[Value]:
        build = self.build_
        count = self.v.smaller_int(build.sub(keys, start), I64(TILE))
        key = self.at(self.key, build.mul(start, self.key_token))
        value = self.at(self.value, build.mul(start, self.value_token))
        return self.v.loop(self.zero, blocks, 1, [], lambda block, _: self.block_tile(block, key, value, count))

    def block_tile(self, block: Value, key: Value, value: Value, count: Value) -> Sequence[Value]:
        """A block's rows over a tile's keys."""
        build, v, num = self.build_, self.v, self.tiling.num_vectors
        tops_at, sums_at = self.of_block(self.tops, block), self.of_block(self.sums, block)
        out = self.of_block(self.outs, block, self.v_dim)
        before = self.lanes_of(tops_at, self.zero)
        tops = self.all_scores(self.of_block(self.queries, block, self.head_dim), key, count, before)
        grown = [build.fcmp_ordered(">", top, old) for top, old in zip(tops, before, strict=True)]
        is_grown = v.any(grown[0])
        for flags in grown[1:]:
            is_grown = build.or_(is_grown, v.any(flags))
        with build.if_then(is_grown):
            shrink = [v.exp2(build.fsub(old, top)) for top, old in zip(tops, before, strict=True)]
            self.shrink_line(sums_at, self.zero, shrink)
            v.loop(self.zero, self.v_dim, 1, [], lambda e, _: self.shrink_line(out, e, shrink))
        self.put_lanes(tops, tops_at, self.zero)

        def weigh(j: Value, sums: list[Value]) -> Sequence[Value]:
            weights = [
                v.exp2(build.fsub(score, top)) for score, top in zip(self.lanes_of(self.scores, j), tops, strict=True)
            ]
            self.put_lanes(weights, self.scores, j)
            return [build.fadd(total, weight) for total, weight in zip(sums, weights, strict=True)]

        self.put_lanes(v.loop(self.zero, count, 1, self.lanes_of(sums_at, self.zero), weigh), sums_at, self.zero)
        assert num == len(tops)
        self.in_groups(
            self.v_dim, self.tiling.num_dims, [], lambda e, size, _: self.add_values(out, value, count, e, size)
        )
        return []

    def shrink_line(self, base: Value, line: Value, by: Sequence[Value]) -> Sequence[Value]:
        build = self.build_
        self.put_lanes([build.fmul(x, s) for x, s in zip(self.lanes_of(base, line), by, strict=True)], base, line)
        return []

    def all_scores(self, queries: Value, key: Value, count: Value, tops: Sequence[Value]) -> list[Value]:
        """Scores of a tile into `self.scores`; the largest so far."""

        def some(first: Value, size: int, tops: list[Value]) -> Sequence[Value]:
            build, v, num = self.build_, self.v, self.tiling.num_vectors
            rows = [self.at(key, build.mul(build.add(first, I64(j)), self.key_token)) for j in range(size)]

            def dim(d: Value, sums: list[Value]) -> Sequence[Value]:
                query = self.lanes_of(queries, d)
                numbers = [v.splat(v.load(row, d)) for row in rows]
                return [v.fma(numbers[j], query[n], sums[j * num + n]) for j in range(size) for n in range(num)]

            scores = v.loop(self.zero, self.head_dim, 1, [v.zero] * (size * num), dim)
            for j in range(size):
                line = scores[j * num : (j + 1) * num]
                self.put_lanes(line, self.scores, build.add(first, I64(j)))
                tops = [v.larger(score, top) for score, top in zip(line, tops, strict=True)]
            return tops

        return self.in_groups(count, self.tiling.num_keys, tops, some)

    def add_values(self, out: Value, value: Value, count: Value, first: Value, size: int) -> Sequence[Value]:
        """`size` dimensions of the values of a tile, weighted, onto the outputs."""
        build, v, num = self.build_, self.v, self.tiling.num_vectors
        dims = [build.add(first, I64(e)) for e in range(size)]

        def one(j: Value, sums: list[Value]) -> Sequence[Value]:
            weights = self.lanes_of(self.scores, j)
            row = self.at(value, build.add(build.mul(j, self.value_token), first))
            numbers = [v.splat(v.load(row, I64(e))) for e in range(size)]
            return [v.fma(numbers[e], weights[n], sums[e * num + n]) for e in range(size) for n in range(num)]

        sums = v.loop(self.zero, count, 1, [x for e in dims for x in self.lanes_of(out, e)], one)
        for index, e in enumerate(dims):
            self.put_lanes(sums[index * num : (index + 1) * num], out, e)
        return []

    def in_groups(self, count: Value, size: int, carried: Sequence[Value], body: object) -> list[Value]:
        """`body(first, size, carried)` for whole groups, then for what is left one by one."""
        build = self.build_
        assert callable(body)
        whole = build.mul(build.sdiv(count, I64(size)), I64(size))
        carried = self.v.loop(self.zero, whole, size, carried, lambda i, values: body(i, size, values))
        return self.v.loop(whole, count, 1, carried, lambda i, values: body(i, 1, values))

    def end(self, block: Value, rows: Value, out: Value, lse: Value) -> Sequence[Value]:
        """What was asked for: outputs over their sums, by row, and the log of the sums."""
        build, v, size = self.build_, self.v, I64(self.tiling.block_rows)
        tops_at, sums_at = self.of_block(self.tops, block), self.of_block(self.sums, block)
        outs = self.of_block(self.outs, block, self.v_dim)
        tops, sums = self.lanes_of(tops_at, self.zero), self.lanes_of(sums_at, self.zero)
        logs = [
            build.fmul(build.fadd(top, v.log2(total)), v.number(LN_2)) for top, total in zip(tops, sums, strict=True)
        ]
        self.put_lanes(logs, tops_at, self.zero)
        first = build.mul(block, size)
        count = v.smaller_int(size, build.sub(rows, first))

        def row(r: Value, _: list[Value]) -> Sequence[Value]:
            target = build.add(first, r)
            v.store(v.load(tops_at, r), lse, target)
            whole = build.fdiv(v.scalar(1.0), v.load(sums_at, r))
            line = self.at(out, build.mul(target, self.v_dim))

            def dim(e: Value, _: list[Value]) -> Sequence[Value]:
                v.store(build.fmul(v.load(outs, build.add(build.mul(e, size), r)), whole), line, e)
                return []

            return v.loop(self.zero, self.v_dim, 1, [], dim)

        return v.loop(self.zero, count, 1, [], row)
