"""Attention of few rows over keys, one row after the other while a tile of keys is in the nearest cache.

Vectors run over dimensions. The products of a vector's worth of keys with a query are summed across all their vectors
at once: halves of two become one, until one vector holds a score for each key. A row reads its keys as fast as memory
gives them; where many rows read the same ones, `block_rows` computes less.

Source: FlashAttention (arXiv 2205.14135) §3.1.
"""

from __future__ import annotations

from collections.abc import Sequence

from spolia_kernels.native.number_table import LN_2, LOWEST
from spolia_kernels.native.rows import Keys, Rows
from spolia_kernels.native.tasks import TILE
from spolia_kernels.native.vectors import F32, I32, I64, Value, Vectors


class FewRows:
    """Builds the attention of up to `most_rows` rows. Widths are multiples of a vector's."""

    def __init__(self, vectors: Vectors, room: Value, most_rows: Value, head_dim: int, v_dim: int) -> None:
        lanes = vectors.lanes
        assert not any(width % lanes for width in (head_dim, v_dim)), "a vector holds dimensions of one key"
        self.v = vectors
        self._head_dim, self._v_dim = head_dim, v_dim
        build = vectors.builder
        self._queries = room  # [rows, head_dim]
        self._outs = build.gep(self._queries, [build.mul(most_rows, I64(head_dim))])  # [rows, v_dim]
        self._tops = build.gep(self._outs, [build.mul(most_rows, I64(v_dim))])  # [rows, lanes], as are sums
        self._sums = build.gep(self._tops, [build.mul(most_rows, I64(lanes))])
        self._scores = build.gep(self._sums, [build.mul(most_rows, I64(lanes))])  # of one row, [TILE]

    def attend(self, rows: Rows, keys: Keys) -> None:
        """Rows over keys, at least one of both."""
        zero, each = I64(0), self.v.loop
        each(zero, rows.count, 1, [], lambda row, _: self._begin(row, rows))
        each(zero, keys.count, TILE, [], lambda start, _: self._tile(keys.part(self.v, start, TILE), rows.count))
        each(zero, rows.count, 1, [], lambda row, _: self._end(row, rows))

    def _line(self, base: Value, row: Value, width: int) -> Value:
        build = self.v.builder
        return build.gep(base, [build.mul(row, I64(width))])

    def _vectors_of(self, address: Value, width: int) -> list[Value]:
        return [self.v.load_vector(address, I64(first)) for first in range(0, width, self.v.lanes)]

    def _put(self, vectors: Sequence[Value], address: Value) -> None:
        for index, vector in enumerate(vectors):
            self.v.store_vector(vector, address, I64(index * self.v.lanes))

    def _begin(self, row: Value, rows: Rows) -> Sequence[Value]:
        v, lanes = self.v, self.v.lanes
        target = self._line(self._queries, row, self._head_dim)
        rows.read_query(v, row, I64(self._head_dim), lambda d, number: v.store(number, target, d))
        self._put([v.zero] * (self._v_dim // lanes), self._line(self._outs, row, self._v_dim))
        self._put([v.number(LOWEST)], self._line(self._tops, row, lanes))
        self._put([v.zero], self._line(self._sums, row, lanes))
        return []

    def _tile(self, tile: Keys, num_rows: Value) -> Sequence[Value]:
        self.v.loop(I64(0), num_rows, 1, [], lambda row, _: self._row_tile(row, tile))
        return []

    def _row_tile(self, row: Value, tile: Keys) -> Sequence[Value]:
        build, v = self.v.builder, self.v
        top_at, sum_at = self._line(self._tops, row, v.lanes), self._line(self._sums, row, v.lanes)
        out = self._line(self._outs, row, self._v_dim)
        (before,) = self._vectors_of(top_at, v.lanes)
        query = self._vectors_of(self._line(self._queries, row, self._head_dim), self._head_dim)
        highest = v.loop(
            I64(0), tile.count, v.lanes, [before], lambda first, t: [self._scores_of(tile, first, query, t)]
        )
        top = v.all_lanes(highest[0], v.larger)
        with build.if_then(v.any(build.fcmp_ordered(">", top, before))):
            shrink = v.exp2(build.fsub(before, top))
            for address, width in ((sum_at, v.lanes), (out, self._v_dim)):
                self._put([build.fmul(x, shrink) for x in self._vectors_of(address, width)], address)
        self._put([top], top_at)

        def weigh(first: Value, sums: list[Value]) -> Sequence[Value]:
            weight = v.exp2(build.fsub(v.load_vector(self._scores, first), top))
            v.store_vector(weight, self._scores, first)
            # What stands for no key scored LOWEST: it is nothing to a sum of at least one.
            return [build.fadd(sums[0], weight)]

        self._put(v.loop(I64(0), tile.count, v.lanes, self._vectors_of(sum_at, v.lanes), weigh), sum_at)

        def add(j: Value, sums: list[Value]) -> Sequence[Value]:
            weight = v.splat(v.load(self._scores, j))
            values = self._vectors_of(tile.value_at(v, j), self._v_dim)
            return [v.fma(weight, value, total) for value, total in zip(values, sums, strict=True)]

        self._put(v.loop(I64(0), tile.count, 1, self._vectors_of(out, self._v_dim), add), out)
        return []

    def _scores_of(self, tile: Keys, first: Value, query: Sequence[Value], tops: Sequence[Value]) -> Value:
        """A query's scores of the keys from `first` on, a vector of them; what is behind the last key scores LOWEST."""
        build, v = self.v.builder, self.v
        last = build.sub(tile.count, I64(1))
        products: list[Value] = []
        for j in range(v.lanes):
            key = self._vectors_of(tile.key_at(v, v.smaller_int(build.add(first, I64(j)), last)), self._head_dim)
            total = build.fmul(key[0], query[0])
            for part, number in zip(key[1:], query[1:], strict=True):
                total = v.fma(part, number, total)
            products.append(total)
        left = v.splat(build.sitofp(build.sub(tile.count, first), F32))
        is_key = build.fcmp_ordered("<", v.lane_numbers, left)
        scores = build.select(is_key, v.sums_of(products), v.number(LOWEST))
        v.store_vector(scores, self._scores, first)
        return v.larger(scores, tops[0])

    def _end(self, row: Value, rows: Rows) -> Sequence[Value]:
        build, v = self.v.builder, self.v
        (top,) = self._vectors_of(self._line(self._tops, row, v.lanes), v.lanes)
        (sums,) = self._vectors_of(self._line(self._sums, row, v.lanes), v.lanes)
        total = v.all_lanes(sums, build.fadd)
        log = build.fmul(build.fadd(top, v.log2(total)), v.number(LN_2))
        v.store(build.extract_element(log, I32(0)), rows.lse(row), I64(0))
        whole = build.fdiv(v.number(1.0), total)
        out = self._vectors_of(self._line(self._outs, row, self._v_dim), self._v_dim)
        self._put([build.fmul(x, whole) for x in out], rows.out(row))
        return []
