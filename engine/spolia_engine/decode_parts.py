"""A decode step's attention put together of parts, where there is no machine code for it.

What a layer does does not depend on the number of sequences: it loops over stretches of slots and over distinct ranges,
never over rows. Everything that the plan and the tails' lengths decide is looked up once a step, or once a batch.

Source: Hydragen (2402.05099) §3, extended to ranges that stand at different positions in each sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spolia_engine.step_plan import Group, StepPlan, Stretch
from spolia_kernels import (
    KeyRange,
    Partial,
    RotaryTable,
    Rotation,
    RowParts,
    TailKeys,
    attend_private,
    merge_seen,
)


class DecodeParts:
    """One row each of many sequences, in the order of a plan. `begin` each step, then call it for every layer."""

    def __init__(self, plan: StepPlan, rotary: RotaryTable) -> None:
        self._slots = [_SlotRows(stretch, rotary.device) for stretch in plan.stretches]
        self._ranges = [_RangeRows(group, plan.num_rows, rotary.device) for group in plan.groups]
        self._queries = _Queries(self._ranges, rotary)
        self._row_parts = _row_parts(self._ranges, plan.num_rows, rotary.device)

    def begin(self, lens: Sequence[int]) -> None:
        """Tokens that each row reads of its slot, the one that is written now included."""
        for slots in self._slots:
            slots.begin(lens)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Tensor:
        """Appends each row's KV to its tail and returns the rows' attention; see `LayerAttention`."""
        own = [slots.attend(layer, query, key, value, sm_scale) for slots in self._slots]
        parts = [own[0] if len(own) == 1 else _side_by_side(own)]
        queries = self._queries.adapted(query)
        parts += [r.attend(layer, q, sm_scale) for r, q in zip(self._ranges, queries, strict=True)]
        if len(parts) == 1:
            return parts[0].out.to(query.dtype)
        if self._row_parts is None:
            return merge_seen(parts).to(query.dtype)
        return self._row_parts.merge(_side_by_side(parts)).to(query.dtype)


class _SlotRows:
    """Rows over what stands in their slots, and the places their new KV goes to."""

    def __init__(self, stretch: Stretch, device: torch.device) -> None:
        self._rows = slice(stretch.first_row, stretch.first_row + stretch.num_rows)
        slots = slice(stretch.first_slot, stretch.first_slot + stretch.num_rows)
        # What the rows read, [num_layers, num_rows, num_kv_heads, capacity, …], and by layer a token's heads together.
        memory = [m[:, slots, :, stretch.first_token :] for m in (stretch.slab.key, stretch.slab.value)]
        self._keys = TailKeys(*memory)
        self._key_lines, self._value_lines = (m.transpose(2, 3).unbind(0) for m in memory)
        self._number = torch.arange(stretch.num_rows, device=device)
        self._places = (self._number, self._number)

    def begin(self, lens: Sequence[int]) -> None:
        self._keys.begin(lens[self._rows])
        self._places = (self._number, self._keys.lens.lens - 1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Partial:
        by_row = [x.transpose(0, 1)[self._rows] for x in (query, key, value)]
        self._key_lines[layer].index_put_(self._places, by_row[1])
        self._value_lines[layer].index_put_(self._places, by_row[2])
        return self._keys.attend(layer, by_row[0], sm_scale=sm_scale)


class _RangeRows:
    """Rows that read one range. `rows` is None where they are all rows of the step in order."""

    def __init__(self, group: Group, num_rows: int, device: torch.device) -> None:
        self.num_rows = len(group.rows)
        self.is_every_row = group.rows == tuple(range(num_rows))
        self.row_numbers = group.rows
        self.offsets = group.offsets
        self._attends_together = group.shared or self.num_rows == 1
        slots = slice(group.slots.start, group.slots.end)
        # Views of where it lies now: should it move, it stays there as it is for as long as somebody looks at it.
        self._keys, self._values = (
            m[:, :, slots].unbind(0) for m in (group.slots.extent.key, group.slots.extent.value)
        )
        self._range = KeyRange(self._keys, self._values)

    def attend(self, layer: int, query: Tensor, sm_scale: float) -> Partial:
        if self._attends_together:
            return self._range.attend(layer, query, sm_scale=sm_scale)
        return attend_private(query, self._keys[layer], self._values[layer], sm_scale=sm_scale)


class _Queries:
    """The queries of every range, each rotated by where the range stands: one gather and one rotation for all."""

    def __init__(self, ranges: Sequence[_RangeRows], rotary: RotaryTable) -> None:
        self._as_they_are = [r.is_every_row and not any(r.offsets) for r in ranges]
        others = [r for r, same in zip(ranges, self._as_they_are, strict=True) if not same]
        self._counts = [r.num_rows for r in others]
        device = rotary.device
        self._rows = torch.tensor([row for r in others for row in r.row_numbers], dtype=torch.int64, device=device)
        offsets = torch.tensor([o for r in others for o in r.offsets], dtype=torch.int64, device=device)
        self._turns = Rotation.to(-offsets, rotary) if bool(offsets.any()) else None
        self._are_groups = all(r.is_every_row for r in others)

    def adapted(self, query: Tensor) -> list[Tensor]:
        """[num_q_heads, rows of the range, head_dim] for each range."""
        if not self._counts:
            return [query] * len(self._as_they_are)
        turned = iter(self._turned(query))
        return [query if same else next(turned) for same in self._as_they_are]

    def _turned(self, query: Tensor) -> Sequence[Tensor]:
        if self._turns is not None and self._are_groups:
            return self._turns.of_groups(query).unbind(0)
        gathered = query.index_select(1, self._rows) if self._turns is None else self._turns(query, self._rows)
        return torch.split(gathered, self._counts, 1)


def _side_by_side(parts: Sequence[Partial]) -> Partial:
    return Partial(torch.cat([part.out for part in parts], 1), torch.cat([part.lse for part in parts], 1))


def _row_parts(ranges: Sequence[_RangeRows], num_rows: int, device: torch.device) -> RowParts | None:
    """Which rows of all parts side by side belong to each row, the slots' being the first. None where all have all."""
    if all(r.is_every_row for r in ranges):
        return None
    found = [[row] for row in range(num_rows)]
    first = num_rows
    for r in ranges:
        for number, row in enumerate(r.row_numbers):
            found[row].append(first + number)
        first += r.num_rows
    return RowParts(found, device)
