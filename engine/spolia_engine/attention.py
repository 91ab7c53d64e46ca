"""The one equation, per layer: out = merge over spans of attend(rotate(q, -offset), K, V).

Two passes share it. A *context pass* runs many rows of one sequence (compile, prefill, link); a *decode pass* runs one
row each of many sequences. Both write the rows' own KV first and then attend: stored KV is read where it lies, queries
are rotated to meet it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spolia_engine.pool import Extent
from spolia_engine.run import SlotRange
from spolia_engine.step_plan import StepPlan
from spolia_kernels import Partial, RotaryTable, attend, merge_into, rotate


@dataclass(frozen=True, slots=True)
class VisibleRange:
    """Slots that rows from `first_row` on see whole and rows before do not see at all."""

    slots: SlotRange
    first_row: int


class ContextAttention:
    """Rows of one sequence, sorted by position: each sees its visible ranges, and the rows at or before it.

    Their KV goes to slots `start` … of `destination`. Source: EPIC (2410.15332) §4, with queries rotated instead of
    keys; CacheBlend's row mask falls out of `first_row` where fragments end between rows.
    """

    def __init__(
        self, destination: Extent, start: int, num_rows: int, visible: Sequence[VisibleRange], rotary: RotaryTable
    ) -> None:
        self._destination = destination
        self._rows = slice(start, start + num_rows)
        self._num_rows = num_rows
        self._visible = [v for v in visible if v.first_row < num_rows]
        self._shifts = {
            v.slots.offset: torch.full((num_rows,), -v.slots.offset, device=destination.key.device)
            for v in self._visible
            if v.slots.offset
        }
        self._rotary = rotary

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Tensor:
        """Writes the layer's KV and returns the rows' attention, [num_q_heads, num_rows, v_dim] in query's dtype."""
        own_key = self._destination.key[layer][:, self._rows]
        own_value = self._destination.value[layer][:, self._rows]
        own_key.copy_(key)
        own_value.copy_(value)
        result = attend(query, own_key, own_value, sm_scale=sm_scale, causal=True)
        for v in self._visible:
            rows = slice(v.first_row, None)
            adapted = query[:, rows]
            if v.slots.offset:
                adapted = rotate(adapted, self._shifts[v.slots.offset][rows], self._rotary)
            part = attend(adapted, *_memory(v.slots, layer), sm_scale=sm_scale)
            merge_into(result, part, rows)
        return result.out.to(query.dtype)


class DecodeAttention:
    """One row each of many sequences: a group of rows attends a shared range once, whatever their offsets.

    Source: Hydragen (2402.05099) §3, extended to ranges that stand at different positions in each sequence.
    """

    def __init__(self, plan: StepPlan, rotary: RotaryTable) -> None:
        self._plan = plan
        self._rotary = rotary

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Tensor:
        """Appends each row's KV to its tail and returns the rows' attention, as `ContextAttention` does."""
        plan = self._plan
        outs, lses = [], []
        for row, tail in enumerate(plan.tails):
            tail.extent.key[layer][:, tail.length] = key[:, row]
            tail.extent.value[layer][:, tail.length] = value[:, row]
            keys = tail.extent.key[layer][:, : tail.length + 1]
            values = tail.extent.value[layer][:, : tail.length + 1]
            private = attend(query[:, row : row + 1], keys, values, sm_scale=sm_scale)
            outs.append(private.out)
            lses.append(private.lse)
        result = Partial(torch.cat(outs, 1), torch.cat(lses, 1))
        for group in plan.groups:
            adapted = query if group.rows is None else query[:, group.rows]
            if group.shifts is not None:
                adapted = rotate(adapted, group.shifts, self._rotary)
            part = attend(adapted, *_memory(group.slots, layer), sm_scale=sm_scale)
            merge_into(result, part, group.rows)
        return result.out.to(query.dtype)


def _memory(slots: SlotRange, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a range, views of pool memory."""
    extent = slots.extent
    return extent.key[layer][:, slots.start : slots.end], extent.value[layer][:, slots.start : slots.end]
