"""A decode step over a device's slots as data: which rows read which slots together, which each for itself.

A row reads by pages of its own what it alone wrote: its head, where nobody else reads that, and its tail. All else are
spans, each read once for all rows that share it. Pure but for the tensors it ends in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spolia_engine.run import SlotRange
from spolia_engine.sharing import Sharing
from spolia_engine.step_plan import Group, Tail, group_ranges
from spolia_kernels.paged import SlotSpan


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """What each row reads. Row r is number r of the batch."""

    spans: tuple[SlotSpan, ...]
    pages: tuple[tuple[int, ...], ...]
    """By row, in order: the page that holds the row's newest token is among them, and those that it will fill."""
    num_before: tuple[int, ...]
    """By row: tokens in its pages before its tail's first."""


def plan_device_step(
    contexts: Sequence[Sequence[SlotRange]], tails: Sequence[Tail], sharing: Sharing, page_size: int
) -> DevicePlan:
    """Plans rows that read `contexts[r]`, their heads and their tails. All extents lie in a device's slots."""
    # What a head has in a page that is not full, its tail's first page has too.
    copied = [0 if tail.head is None else tail.head.capacity % page_size for tail in tails]
    heads = [_head_range(tail, count) for tail, count in zip(tails, copied, strict=True)]
    groups = group_ranges(
        [[*ranges, *([head] if head else [])] for ranges, head in zip(contexts, heads, strict=True)], sharing
    )
    pages = [_pages_of(SlotRange(tail.extent, 0, tail.extent.capacity, 0), page_size) for tail in tails]
    before = list(copied)
    spans: list[SlotSpan] = []
    for group in groups:
        row = group.rows[0]
        if len(group.rows) == 1 and _is_whole(group.slots, heads[row]):
            pages[row] = (*_pages_of(group.slots, page_size), *pages[row])
            before[row] += group.slots.end - group.slots.start
        else:
            spans += _spans_of(group)
    return DevicePlan(tuple(spans), tuple(pages), tuple(before))


def _head_range(tail: Tail, num_copied: int) -> SlotRange | None:
    """The full pages of a head."""
    if tail.head is None or tail.head.capacity == num_copied:
        return None
    return SlotRange(tail.head, 0, tail.head.capacity - num_copied, 0)


def _is_whole(slots: SlotRange, head: SlotRange | None) -> bool:
    return head is not None and (slots.extent, slots.start, slots.end) == (head.extent, head.start, head.end)


def _pages_of(slots: SlotRange, page_size: int) -> tuple[int, ...]:
    """Pages that a range lies in, in order. A tail begins inside its first, behind what was copied."""
    found: list[int] = []
    for first, end in slots.extent.slots(slots.start, slots.end):
        found += range(first // page_size, -(-end // page_size))
    return tuple(found)


def _spans_of(group: Group) -> list[SlotSpan]:
    """A span for each piece of memory that the range lies in; where a key is stored says nothing of where it stands."""
    together = group.shared or len(group.rows) == 1
    readers = [(group.rows, group.offsets)]
    if not together:
        readers = [((row,), (offset,)) for row, offset in zip(group.rows, group.offsets, strict=True)]
    pieces = list(group.slots.extent.slots(group.slots.start, group.slots.end))
    return [SlotSpan(first, end, rows, offsets) for rows, offsets in readers for first, end in pieces]
