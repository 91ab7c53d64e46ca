"""A decode step's attention: what each sequence alone reads, each shared range once, one merge.

    out[row] = merge( its slot, every range it reads, each with the query rotated by the range's offset )

On a CPU a layer is two calls of machine code (`spolia_kernels.span_step`), else it is put together (`decode_parts.py`).
Everything that the plan decides is laid down once a batch.

Source: Hydragen (2402.05099) §3, extended to ranges that stand at different positions in each sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from spolia_engine.decode_parts import DecodeParts
from spolia_engine.model_layers import LayerAttention
from spolia_engine.step_plan import Group, StepPlan, Stretch, Tail
from spolia_kernels import RotaryTable, Rotation, SlotRows, SpanRange, SpanStep, span_kernels


class _Way(LayerAttention, Protocol):
    def begin(self, lens: Sequence[int]) -> None:
        """Tokens that each row reads of its slot, the one that is written now included."""
        ...


class DecodeAttention:
    """One row each of many sequences, in the order of a plan. `begin` each step, then call it for every layer."""

    def __init__(self, plan: StepPlan, tails: Sequence[Tail], rotary: RotaryTable, num_q_heads: int) -> None:
        """`tails[i]` is that of sequence i of the batch that was planned."""
        self._tails = [tails[number] for number in plan.order]
        self._firsts = [stretch.first_token for stretch in plan.stretches for _ in range(stretch.num_rows)]
        self._way = _way_of(plan, rotary, num_q_heads)

    def begin(self) -> None:
        """Reads the tails' lengths: this step writes behind them."""
        self._way.begin(
            [tail.num_before - first + tail.length + 1 for tail, first in zip(self._tails, self._firsts, strict=True)]
        )

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Tensor:
        """Appends each row's KV to its tail and returns the rows' attention; see `LayerAttention`."""
        return self._way(layer, query, key, value, sm_scale)


def _way_of(plan: StepPlan, rotary: RotaryTable, num_q_heads: int) -> _Way:
    if rotary.device.type != "cpu":
        return DecodeParts(plan, rotary)
    slots = [_slot_rows(stretch) for stretch in plan.stretches]
    ranges = [_span_range(group, rotary) for group in plan.groups]
    here = span_kernels(slots, ranges)
    return DecodeParts(plan, rotary) if here is None else SpanStep(here, slots, ranges, num_q_heads)


def _slot_rows(stretch: Stretch) -> SlotRows:
    slots = slice(stretch.first_slot, stretch.first_slot + stretch.num_rows)
    return SlotRows(*(m[:, slots, :, stretch.first_token :] for m in (stretch.slab.key, stretch.slab.value)))


def _span_range(group: Group, rotary: RotaryTable) -> SpanRange:
    """A range where it lies now: should its extent move, it stays there as it is while somebody looks at it."""
    slots = slice(group.slots.start, group.slots.end)
    turn = None
    if any(group.offsets):
        turn = Rotation.to(torch.tensor([-offset for offset in group.offsets], device=rotary.device), rotary)
    key, value = (m[:, :, slots] for m in (group.slots.extent.key, group.slots.extent.value))
    return SpanRange(key, value, group.rows, turn, group.shared or len(group.rows) == 1)
