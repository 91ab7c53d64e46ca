"""The decode step as data: which rows attend which range together. Built when the batch changes, not per layer.

Rows of a plan are the batch's in another order: by where their tails lie, so that neighbours are attended in one call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from spolia_engine.extent import Extent
from spolia_engine.run import Run, SlotRange, Span
from spolia_engine.sharing import Sharing, always_shared
from spolia_engine.slab import Slab, Slot


@dataclass(slots=True, eq=False)
class Tail:
    """A sequence's open run: its newest KV, `length` tokens so far. Only its owner writes it.

    `head` is what stands before it in its slot, if anything: the owner reads both as one.
    """

    extent: Extent
    rope_base: int
    length: int = 0
    head: Extent | None = None

    @property
    def slot(self) -> Slot:
        """Where it lies, behind what else its sequence alone reads."""
        assert self.extent.slot is not None, "a tail is written in a slot"
        return self.extent.slot

    @property
    def num_before(self) -> int:
        """Tokens before it in its slot."""
        return 0 if self.head is None else self.head.capacity

    @property
    def span(self) -> Span:
        """What has been written so far."""
        return Span(Run(self.extent, 0, self.length, self.rope_base), 0, self.length, 0)


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that read one range, `offsets[i]` being where the range stands for row `rows[i]`; rows are distinct.

    `shared`: they attend it together, in one product; else each reads it for itself. `slots.offset` is unused.
    """

    slots: SlotRange
    rows: tuple[int, ...]
    offsets: tuple[int, ...]
    shared: bool


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """Rows `first_row` … whose tails lie in slots `first_slot` … of one slab, `num_rows` of both.

    They read their slots from token `first_token` on.
    """

    slab: Slab
    first_slot: int
    first_row: int
    num_rows: int
    first_token: int


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """One decode step. Row r is number `order[r]` of the batch; stretches cover the rows in order."""

    order: tuple[int, ...]
    stretches: tuple[Stretch, ...]
    groups: tuple[Group, ...]

    @property
    def num_rows(self) -> int:
        """Sequences of the step."""
        return len(self.order)


def plan_step(
    contexts: Sequence[Sequence[SlotRange]], tails: Sequence[Tail], sharing: Sharing = always_shared
) -> StepPlan:
    """Groups (row, range) over the batch by memory. `contexts[i]` is what sequence i reads besides its slot.

    Ranges of one extent are cut where any row's range begins or ends; pieces seen by the same rows at the same offsets
    are joined again. So a chunk that some rows read from token 0 and others from token k makes two groups: one for the
    rest, joined by all, one for the head. `sharing` says of each piece whether its readers attend it together.

    A sequence whose head others read as well reads it as they do, and only its tail in its slot.
    """
    order = sorted(range(len(tails)), key=lambda i: (id(tails[i].slot.slab), tails[i].slot.index))
    by_extent = _by_extent([contexts[number] for number in order])
    starts: list[int] = []
    for row, number in enumerate(order):
        head = tails[number].head
        if is_read_by_others := head is not None and head in by_extent:
            by_extent[head].append((row, SlotRange(head, 0, head.capacity, 0)))
        starts.append(tails[number].num_before if is_read_by_others else 0)
    stretches = _stretches([tails[number].slot for number in order], starts)
    return StepPlan(tuple(order), tuple(stretches), _groups(by_extent, sharing))


def group_ranges(contexts: Sequence[Sequence[SlotRange]], sharing: Sharing = always_shared) -> tuple[Group, ...]:
    """The groups of rows that read `contexts[r]` each, as `plan_step` makes them."""
    return _groups(_by_extent(contexts), sharing)


def _by_extent(contexts: Sequence[Sequence[SlotRange]]) -> dict[Extent, list[tuple[int, SlotRange]]]:
    by_extent: dict[Extent, list[tuple[int, SlotRange]]] = defaultdict(list)
    for row, ranges in enumerate(contexts):
        for slots in ranges:
            by_extent[slots.extent].append((row, slots))
    return by_extent


def _groups(by_extent: dict[Extent, list[tuple[int, SlotRange]]], sharing: Sharing) -> tuple[Group, ...]:
    return tuple(
        _group(SlotRange(extent, start, end, 0), readers, sharing)
        for extent, uses in by_extent.items()
        for start, end, readers in _pieces(uses)
    )


def _stretches(slots: Sequence[Slot], starts: Sequence[int]) -> Iterator[Stretch]:
    first = 0
    for row in range(1, len(slots) + 1):
        ends = row == len(slots) or (slots[row].slab, starts[row]) != (slots[first].slab, starts[first])
        if ends or slots[row].index != slots[first].index + row - first:
            yield Stretch(slots[first].slab, slots[first].index, first, row - first, starts[first])
            first = row


def _group(slots: SlotRange, readers: Readers, sharing: Sharing) -> Group:
    shared = len(readers) > 1 and sharing(len(readers), slots.end - slots.start)
    return Group(slots, tuple(row for row, _ in readers), tuple(offset for _, offset in readers), shared)


Readers = tuple[tuple[int, int], ...]  # (row, offset), rows ascending


def _pieces(uses: list[tuple[int, SlotRange]]) -> Iterator[tuple[int, int, Readers]]:
    """(start, end, readers) pieces that cover `uses`, every piece read by all its readers."""
    for layer in _distinct_rows(uses):
        cuts = sorted({s.start for _, s in layer} | {s.end for _, s in layer})
        pending: tuple[int, int, Readers] | None = None
        for start, end in pairwise(cuts):
            readers = tuple(sorted((row, s.offset) for row, s in layer if s.start <= start and end <= s.end))
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
