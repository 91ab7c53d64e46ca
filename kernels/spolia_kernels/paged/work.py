"""Who attends what, as lists a kernel walks through: built when the batch changes, the same for every layer.

A *reading* is one row that reads one range, at an offset of its own. An *item* is a tile of readings of one range
over a piece of its keys, for one KV head; every item writes partials of its own, so items run in any order and
anywhere. A *part* is the place of one reading's partial over one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

ITEM_FIELDS = 8
"""kv_head, first reading, number of readings, first slot, end slot, first part; two numbers to spare."""


@dataclass(frozen=True, slots=True)
class SlotSpan:
    """Slots `start` … `end`, read by distinct rows, standing `offsets[i]` further on for row `rows[i]`."""

    start: int
    end: int
    rows: tuple[int, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class PagedWork:
    """Items over slots and where their partials go. All int32, on one device."""

    items: Tensor
    """[num_items, ITEM_FIELDS]."""
    num_items: Tensor
    """[1]: how many of `items` there are; a kernel reads it on the device, so lists of one capacity share a graph."""
    rows: Tensor
    """[num_readings]."""
    offsets: Tensor
    """[num_readings]."""
    part_starts: Tensor
    """[num_rows + 1]: row r's partials are `parts[part_starts[r] : part_starts[r + 1]]`."""
    parts: Tensor
    num_parts: int
    tile: int
    """Query rows of an item, GQA groups packed: a kernel's tile height."""


@dataclass(frozen=True, slots=True)
class WorkShape:
    """What work is cut by: tiles of `tile` query rows, a power of two from 16 on; pieces of about `piece_keys` keys."""

    num_kv_heads: int
    group_size: int
    tile: int
    piece_keys: int

    @property
    def readings(self) -> int:
        """Readings that a tile holds."""
        return self.tile // self.group_size


def plan_work(
    spans: Sequence[SlotSpan], num_rows: int, shape: WorkShape, device: torch.device | str = "cpu"
) -> PagedWork:
    """Cuts spans into items. Tiles of one span over one piece and head follow each other: they read the same keys.

    Raises ValueError for an empty span, a row outside 0 … num_rows, or a GQA group that no tile holds.
    """
    if shape.tile < 16 or shape.tile & (shape.tile - 1):
        raise ValueError(f"a tile is a power of two from 16 on; got {shape.tile}")
    if shape.readings < 1:
        raise ValueError(f"a GQA group of {shape.group_size} does not fit a tile of {shape.tile}")
    items: list[tuple[int, ...]] = []
    rows: list[int] = []
    offsets: list[int] = []
    parts_of_row: list[list[int]] = [[] for _ in range(num_rows)]
    num_parts = 0
    for span in spans:
        _check(span, num_rows)
        count = len(span.rows)
        tiles = [(first, min(shape.readings, count - first)) for first in range(0, count, shape.readings)]
        for start, end in pieces(span.start, span.end, shape.piece_keys):
            items += [
                (head, len(rows) + first, size, start, end, num_parts + first, 0, 0)
                for head in range(shape.num_kv_heads)
                for first, size in tiles
            ]
            for i, row in enumerate(span.rows):
                parts_of_row[row].append(num_parts + i)
            num_parts += count
        rows += span.rows
        offsets += span.offsets
    starts = [0]
    for parts in parts_of_row:
        starts.append(starts[-1] + len(parts))

    def ints(values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return PagedWork(
        items=ints(items).reshape(-1, ITEM_FIELDS),
        num_items=ints([len(items)]),
        rows=ints(rows),
        offsets=ints(offsets),
        part_starts=ints(starts),
        parts=ints([part for parts in parts_of_row for part in parts]),
        num_parts=num_parts,
        tile=shape.tile,
    )


def pieces(start: int, end: int, piece_keys: int) -> list[tuple[int, int]]:
    """Slots `start` … `end` in pieces of about equal length, at most `piece_keys` and 16; all but the last in 16s."""
    num_pieces = -(-(end - start) // piece_keys)
    cuts = [(start + (end - start) * i // num_pieces) // 16 * 16 for i in range(1, num_pieces)]
    return list(pairwise([start, *(cut for cut in dict.fromkeys(cuts) if cut > start), end]))


def _check(span: SlotSpan, num_rows: int) -> None:
    if not 0 <= span.start < span.end:
        raise ValueError(f"slots {span.start} … {span.end}")
    if len(span.rows) != len(span.offsets) or not span.rows:
        raise ValueError(f"{len(span.rows)} rows at {len(span.offsets)} offsets")
    if min(span.rows) < 0 or max(span.rows) >= num_rows:
        raise ValueError(f"rows {min(span.rows)} … {max(span.rows)} of {num_rows}")
