"""The decode step as data: which rows attend which range together. Built when the batch changes, not per layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from spolia_engine.pool import Extent
from spolia_engine.run import Run, SlotRange, Span


@dataclass(slots=True, eq=False)
class Tail:
    """A sequence's open run: its newest KV, `length` tokens so far. Only its owner writes it."""

    extent: Extent
    rope_base: int
    length: int = 0

    @property
    def span(self) -> Span:
        """What has been written so far."""
        return Span(Run(self.extent, 0, self.length, self.rope_base), 0, self.length, 0)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Rows that attend one range in one product.

    `rows` [n] int64, or None for all rows in order; `shifts` [n] int64 rotates each row's query by minus its own
    offset, None where every offset is 0. `slots.offset` is unused here: offsets differ by row.
    """

    slots: SlotRange
    rows: Tensor | None
    shifts: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """One decode step: `tails[i]` belongs to row i; every group names its rows."""

    tails: tuple[Tail, ...]
    groups: tuple[Group, ...]


def plan_step(contexts: Sequence[Sequence[SlotRange]], tails: Sequence[Tail]) -> StepPlan:
    """Groups (row, range) over the batch by memory. `contexts[i]` is what row i sees besides its tail.

    Ranges of one extent are cut where any row's range begins or ends; pieces seen by the same rows at the same offsets
    are joined again. So a chunk that some rows read from token 0 and others from token k makes two groups: one for the
    rest, joined by all, one for the head.
    """
    by_extent: dict[Extent, list[tuple[int, SlotRange]]] = defaultdict(list)
    for row, ranges in enumerate(contexts):
        for slots in ranges:
            by_extent[slots.extent].append((row, slots))
    groups = [
        _group(extent, start, end, readers, len(tails))
        for extent, uses in by_extent.items()
        for start, end, readers in _pieces(uses)
    ]
    return StepPlan(tuple(tails), tuple(groups))


Readers = tuple[tuple[int, int], ...]  # (row, offset), rows distinct


def _pieces(uses: list[tuple[int, SlotRange]]) -> Iterator[tuple[int, int, Readers]]:
    """(start, end, readers) pieces that cover `uses`, every piece read by all its readers."""
    for layer in _distinct_rows(uses):
        cuts = sorted({s.start for _, s in layer} | {s.end for _, s in layer})
        pending: tuple[int, int, Readers] | None = None
        for start, end in pairwise(cuts):
            readers = tuple((row, s.offset) for row, s in layer if s.start <= start and end <= s.end)
            if pending and pending[1] == start and pending[2] == readers:
                pending = (pending[0], end, readers)
                continue
            if pending and pending[2]:
                yield pending
            pending = (start, end, readers)
        if pending and pending[2]:
            yield pending


def _distinct_rows(uses: list[tuple[int, SlotRange]]) -> Iterator[list[tuple[int, SlotRange]]]:
    """Splits uses so that overlapping ranges of one row (a document twice in a prompt) fall into different lists."""
    rest = uses
    while rest:
        taken: list[tuple[int, SlotRange]] = []
        left: list[tuple[int, SlotRange]] = []
        for row, slots in rest:
            clash = any(r == row and s.start < slots.end and slots.start < s.end for r, s in taken)
            (left if clash else taken).append((row, slots))
        yield taken
        rest = left


def _group(extent: Extent, start: int, end: int, readers: Readers, num_rows: int) -> Group:
    device = extent.key.device
    rows = [row for row, _ in readers]
    offsets = [offset for _, offset in readers]
    every_row = rows == list(range(num_rows))
    return Group(
        SlotRange(extent, start, end, 0),
        None if every_row else torch.tensor(rows, device=device),
        torch.tensor([-o for o in offsets], device=device) if any(offsets) else None,
    )
