"""The one equation, per layer: out = merge over spans of attend(rotate(q, -offset), K, V).

Three passes share it. A *context pass* runs many rows of one sequence (compile, prefill, link), or of several at once
(`slices`); a *fork pass* many rows of many tails behind one context (`fork_attention`); a *decode pass* one row each of
many sequences (`decode_attention`). All write the rows' own KV and attend: stored KV is read where it lies, and queries
rotate to meet it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spolia_engine.extent import Extent
from spolia_engine.run import SlotRange, Span, coalesce
from spolia_kernels import Partial, RotaryTable, Rotation, attend, merge_into


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
    """What the rows of a pass see besides each other; the rotation of each offset is looked up once for all layers."""

    def __init__(self, visible: Iterable[VisibleRange], rotary: RotaryTable) -> None:
        self._visible = tuple(visible)
        offsets = {v.slots.offset for v in self._visible if v.slots.offset}
        self._turns = {o: Rotation.to(torch.tensor([-o], device=rotary.device), rotary) for o in offsets}

    def merge_into(self, result: Partial, query: Tensor, layer: int, sm_scale: float) -> None:
        """Merges attention of `query` [num_q_heads, num_rows, head_dim] over the ranges into the rows' `result`."""
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
        result = attend(query, key, value, sm_scale=sm_scale, causal=True)
        self.merge_visible_into(result, query, layer, sm_scale)
        return result.out.to(query.dtype)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Writes the layer's KV of the rows."""
        self._destination.write(layer, self._start, key[:, self._kept], value[:, self._kept])

    def merge_visible_into(self, result: Partial, query: Tensor, layer: int, sm_scale: float) -> None:
        """Merges what the rows see besides each other into their `result`."""
        self._visible.merge_into(result, query, layer, sm_scale)
