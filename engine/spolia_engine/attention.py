"""The one equation, per layer: out = merge over spans of attend(rotate(q, -offset), K, V).

Three passes share it. A *context pass* runs many rows of one sequence (compile, prefill, link), or of several at once
(`slices`); a *fork pass* many rows of many tails behind one context (`fork_attention`); a *decode pass* one row each of
many sequences (`decode_attention`). All write the rows' own KV and attend: stored KV is read where it lies, and queries
rotate to meet it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spolia_engine.extent import Extent, Piece
from spolia_engine.run import SlotRange, Span, coalesce
from spolia_kernels import (
    Heads,
    Partial,
    RotaryTable,
    Rotation,
    SpanPass,
    SpanRange,
    attend,
    merge_into,
    pass_kernels,
)


@dataclass(frozen=True, slots=True)
class VisibleRange:
    """Slots that rows from `first_row` on see whole and rows before do not see at all."""

    slots: SlotRange
    first_row: int


def visible_ranges(visible: Iterable[tuple[Span, int]]) -> list[VisibleRange]:
    """(span, first row) pairs as memory ranges; neighbours in memory that the same rows see are read as one."""
    by_first_row: dict[int, list[Span]] = {}
    for span, first_row in visible:
        by_first_row.setdefault(first_row, []).append(span)
    return [VisibleRange(slots, row) for row, spans in by_first_row.items() for slots in coalesce(spans)]


class VisibleRanges:
    """What the rows of a pass see besides each other; the rotation of each offset is looked up once for all layers.

    On a CPU a layer is two calls of machine code (`spolia_kernels.span_step`), else a few for each range.
    """

    def __init__(self, visible: Iterable[VisibleRange], rotary: RotaryTable) -> None:
        self._visible = tuple(visible)
        offsets = {v.slots.offset for v in self._visible if v.slots.offset}
        self._turns = {o: Rotation.to(torch.tensor([-o], device=rotary.device), rotary) for o in offsets}
        self._pass: SpanPass | None = None
        self._pieces: list[tuple[Piece, ...]] | None = None
        """Where the ranges lay when the pass was laid down, if it was."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Tensor:
        """Attention of rows over the ranges and over those of themselves at or before each; see `LayerAttention`."""
        heads = Heads(query.shape[0], key.shape[0], query.shape[2], value.shape[2])
        here = self._pass_of(query, heads, sees_itself=True)
        if here is not None:
            return here.attend(layer, query, key, value, sm_scale)
        result = attend(query, key, value, sm_scale=sm_scale, causal=True)
        self._merge_into(result, query, layer, sm_scale)
        return result.out.to(query.dtype)

    def add_to(self, own: Partial, query: Tensor, layer: int, sm_scale: float) -> None:
        """`own.out` of rows `query` [num_q_heads, num_rows, head_dim], none of which is empty, becomes that of all they
        see. `own.lse` says nothing afterwards.
        """
        if not self._visible:
            return
        piece = self._visible[0].slots.extent.pieces[0]
        heads = Heads(query.shape[0], piece.key.shape[1], piece.key.shape[3], piece.value.shape[3])
        here = self._pass_of(query, heads, sees_itself=False)
        if here is not None:
            own.out.copy_(here.beside(own, layer, query, sm_scale))
        else:
            self._merge_into(own, query, layer, sm_scale)

    def _pass_of(self, query: Tensor, heads: Heads, *, sees_itself: bool) -> SpanPass | None:
        """Laid down at the first layer, and again where something came to lie elsewhere; None where there is none."""
        pieces = [v.slots.extent.pieces for v in self._visible]
        if self._pieces is None or any(now is not then for now, then in zip(pieces, self._pieces, strict=True)):
            ranges = list(self._span_ranges(query.shape[1]))
            kernels, num_rows = pass_kernels(query, heads, ranges), query.shape[1]
            self._pass = (
                None if kernels is None else SpanPass(kernels, heads, ranges, num_rows, sees_itself=sees_itself)
            )
            self._pieces = pieces
        return self._pass

    def _span_ranges(self, num_rows: int) -> Iterator[SpanRange]:
        for v in self._visible:
            rows, turn = tuple(range(v.first_row, num_rows)), self._turns.get(v.slots.offset)
            for piece in v.slots.extent.parts(v.slots.start, v.slots.end):
                yield SpanRange(piece.key, piece.value, rows, turn, True)

    def _merge_into(self, result: Partial, query: Tensor, layer: int, sm_scale: float) -> None:
        for v in self._visible:
            rows = slice(v.first_row, None)
            adapted = query[:, rows]
            if v.slots.offset:
                adapted = self._turns[v.slots.offset](adapted)
            for piece in v.slots.extent.parts(v.slots.start, v.slots.end):
                part = attend(adapted, piece.key[layer], piece.value[layer], sm_scale=sm_scale)
                merge_into(result, part, rows)


class ContextAttention:
    """Rows of one sequence, sorted by position: each sees its visible ranges, and the rows at or before it.

    Their KV goes to slots `start` … of `destination`, but for the first `num_dropped` rows, which is kept nowhere.
    Source: EPIC (2410.15332) §4, with queries rotated instead of keys; CacheBlend's row mask falls out of `first_row`
    where fragments end between rows.
    """

    def __init__(
        self,
        destination: Extent,
        start: int,
        num_rows: int,
        visible: Sequence[VisibleRange],
        rotary: RotaryTable,
        *,
        num_dropped: int = 0,
    ) -> None:
        self._destination = destination
        self._start = start
        self._kept = slice(num_dropped, None)
        self._visible = VisibleRanges((v for v in visible if v.first_row < num_rows), rotary)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Tensor:
        """Writes the layer's KV and returns the rows' attention, [num_q_heads, num_rows, v_dim] in query's dtype."""
        self.write(layer, key, value)
        return self._visible.attend(layer, query, key, value, sm_scale)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Writes the layer's KV of the rows."""
        self._destination.write(layer, self._start, key[:, self._kept], value[:, self._kept])

    def add_visible_to(self, own: Partial, query: Tensor, layer: int, sm_scale: float) -> None:
        """Adds what the rows see besides each other to what they see of each other; see `VisibleRanges.add_to`."""
        self._visible.add_to(own, query, layer, sm_scale)
