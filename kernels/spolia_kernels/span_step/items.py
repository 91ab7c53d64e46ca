"""The work of a layer of a step or a pass as items that threads take, and where each leaves what it found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from operator import attrgetter

import torch
from torch import Tensor

from spolia_kernels.attend.native_cpu import FEW_ROWS
from spolia_kernels.native.tasks import BLOCK, FEW, ITEM, RANGE, SLOT, SLOT_KIND, TRIANGLE
from spolia_kernels.span_step.spans import SlotRows, SpanRange

_BLOCKS_PER_CHUNK = 4
_MIN_KEYS_PER_CUT = 512
_ITEM_LINE = attrgetter(*ITEM)
_SLOT_KEY, _SLOT_VALUE = SLOT.index("key"), SLOT.index("value")


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """What kernels read, int64; see `spolia_kernels.native.tasks`."""

    items: Tensor
    ranges: Tensor
    slots: Tensor
    starts: Tensor
    entries: Tensor
    kept: tuple[Tensor, ...]
    """What the others say the addresses of."""


@dataclass(slots=True)  # not frozen: making one takes 0.1 us, frozen 1.0
class Item:
    """A row of the items' table, and about how long it takes: keys times rows."""

    kind: int
    place: int
    head: int
    first: int
    stride: int
    count: int
    cut: int
    cost: int


class StepItems:
    """Cuts ranges so that no item is more than its share, and orders items so that long ones are begun first."""

    def __init__(
        self,
        num_rows: int,
        ranges: Sequence[SpanRange],
        num_kv_heads: int,
        group_size: int,
        block_rows: int,
        num_threads: int,
        *,
        slots: Sequence[SlotRows] = (),
        triangle_rows: int = 0,
    ) -> None:
        """`block_rows`: rows that are computed together where many attend a range. Of every row's own part the items
        are its slot's, or triangles of so many rows, or none.
        """
        self._slots, self._ranges, self._triangle_rows = slots, ranges, triangle_rows
        self._heads, self._group, self._block_rows = num_kv_heads, group_size, block_rows
        self.num_rows = num_rows
        whole = sum(each.key.shape[2] * len(each.rows) for each in ranges) * group_size * num_kv_heads
        self._cuts = [self._cuts_of(each, whole / (2 * num_threads)) for each in ranges]
        self.items = sorted(self._all(), key=lambda item: -item.cost)
        self.most_rows = max((group_size if item.kind == TRIANGLE else item.count for item in self.items), default=1)
        firsts = [self.num_rows * group_size]
        for each, cuts in zip(ranges, self._cuts, strict=True):
            firsts.append(firsts[-1] + cuts * len(each.rows) * group_size)
        *self._first_parts, self.num_parts = firsts

    def tables(self) -> Tables:
        """As kernels read them."""
        kept: list[Tensor] = []
        ranges = [self._range(number, kept) for number in range(len(self._ranges))]
        entries = self._entries()
        starts = [0]
        for each in entries:
            starts.append(starts[-1] + len(each))
        items = list(map(_ITEM_LINE, self.items))
        return Tables(
            _ints(items, len(ITEM)),
            _ints(ranges, len(RANGE)),
            _ints(list(self._slot_lines()), len(SLOT)),
            torch.tensor(starts, dtype=torch.int64),
            _ints([entry for each in entries for entry in each], 2),
            tuple(kept),
        )

    def _cuts_of(self, each: SpanRange, share: float) -> int:
        """Cuts of a range's keys such that an item is no more than a share of the work, if there are keys enough."""
        num_keys = each.key.shape[2]
        cost = num_keys * self._group * (len(each.rows) if each.together else 1)
        return max(1, min(round(cost / share), num_keys // _MIN_KEYS_PER_CUT))

    def _all(self) -> Iterator[Item]:
        if self._slots:
            for row in range(self.num_rows):
                for head in range(self._heads):
                    yield Item(SLOT_KIND, row, head, 0, 1, self._group, 0, 0)
        if self._triangle_rows:
            for first in range(0, self.num_rows, self._triangle_rows):
                count = min(self._triangle_rows, self.num_rows - first)
                for head in range(self._heads):
                    yield Item(TRIANGLE, first, head, 0, 1, count, 0, count * count * self._group)
        for number, (each, cuts) in enumerate(zip(self._ranges, self._cuts, strict=True)):
            cut_keys = ceil(each.key.shape[2] / cuts)
            for first, stride, count in self._picks(each):
                kind = FEW if count <= FEW_ROWS else BLOCK
                for cut in range(cuts):
                    for head in range(self._heads):
                        yield Item(kind, number, head, first, stride, count, cut, cut_keys * count)

    def _picks(self, each: SpanRange) -> Iterator[tuple[int, int, int]]:
        """(first, stride, count) of the stacked rows, query head by query head, of each item."""
        num_rows = len(each.rows)
        if not each.together:
            yield from ((row, num_rows, self._group) for row in range(num_rows))
            return
        stacked = num_rows * self._group
        blocks = ceil(stacked / self._block_rows)
        size = ceil(blocks / ceil(blocks / _BLOCKS_PER_CHUNK)) * self._block_rows
        yield from ((first, 1, min(size, stacked - first)) for first in range(0, stacked, size))

    def _range(self, number: int, kept: list[Tensor]) -> list[int]:
        each, cuts = self._ranges[number], self._cuts[number]
        rows = torch.tensor(each.rows, dtype=torch.int64)
        if each.turn is None:
            half = each.key.shape[3] // 2
            cos, sin, turn_row = torch.ones(half), torch.zeros(half), 0
        else:
            cos, sin = each.turn.cos.contiguous(), each.turn.sin.contiguous()
            half, turn_row = cos.shape[1], cos.shape[1] if cos.shape[0] > 1 else 0
        kept += [rows, cos, sin]
        num_keys = each.key.shape[2]
        line = {
            **_memory("key", each.key, ("layer", "head", "token")),
            **_memory("value", each.value, ("layer", "head", "token")),
            "num_keys": num_keys,
            "cut_keys": ceil(num_keys / cuts),
            "num_rows": len(each.rows),
            "rows": rows.data_ptr(),
            "cos": cos.data_ptr(),
            "sin": sin.data_ptr(),
            "turn_row": turn_row,
            "half": half,
            "first_part": self._first_parts[number],
        }
        return [line[name] for name in RANGE]

    def _slot_lines(self) -> Iterator[list[int]]:
        for each in self._slots:
            first = {
                **_memory("key", each.key[:, 0], ("layer", "head")),
                **_memory("value", each.value[:, 0], ("layer", "head")),
                "num_keys": 0,
            }
            line = [first[name] for name in SLOT]
            for _ in range(each.num_rows):
                yield line.copy()
                for place, memory in ((_SLOT_KEY, each.key), (_SLOT_VALUE, each.value)):
                    line[place] += memory.stride(1) * memory.itemsize

    def _entries(self) -> list[list[list[int]]]:
        """For each row its parts: that of the first query head, and how far the next one's is."""
        entries = [[[row, self.num_rows]] for row in range(self.num_rows)]
        for each, cuts, first in zip(self._ranges, self._cuts, self._first_parts, strict=True):
            num_rows = len(each.rows)
            for cut in range(cuts):
                for place, row in enumerate(each.rows):
                    entries[row].append([first + cut * num_rows * self._group + place, num_rows])
        return entries


def _memory(name: str, x: Tensor, strides: Sequence[str]) -> dict[str, int]:
    found = {f"{name}_{stride}": x.stride(number) for number, stride in enumerate(strides)}
    return {name: x.data_ptr(), **found}


def _ints(lines: Sequence[Sequence[int]], width: int) -> Tensor:
    return torch.tensor(lines, dtype=torch.int64).view(-1, width)
