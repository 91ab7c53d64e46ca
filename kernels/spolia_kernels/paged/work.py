"""Who attends what, as lists a kernel walks through: built when the batch changes, the same for every layer.

A *reading* is one row that reads one range, at an offset of its own. An *item* is a tile of readings of one range
over a piece of its keys, for one KV head; every item writes partials of its own, so items run in any order and
anywhere. A *part* is the place of one reading's partial over one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ITEM_FIELDS = 8
"""kv_head, first reading, number of readings, first page, first key, end key, first part; one number to spare."""


@dataclass(frozen=True, slots=True)
class PagedRange:
    """Keys `start` … `end` of `pages`, counted from the first page's first token, read by rows.

    Key j was rotated to `base` + j; it counts as standing at `offsets[i]` + base + j for row `rows[i]`. `base` is the
    reader's matter: queries rotate by position - offset.
    """

    pages: tuple[int, ...]
    start: int
    end: int
    rows: tuple[int, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class PagedWork:
    """Items over paged memory and where their partials go. All int32, on one device."""

    items: Tensor
    """[num_items, ITEM_FIELDS]."""
    num_items: Tensor
    """[1]: how many of `items` there are; a kernel reads it on the device, so lists of one capacity share a graph."""
    rows: Tensor
    """[num_readings]."""
    offsets: Tensor
    """[num_readings]."""
    pages: Tensor
    part_starts: Tensor
    """[num_rows + 1]: row r's partials are `parts[part_starts[r] : part_starts[r + 1]]`."""
    parts: Tensor
    num_parts: int
    tile: int
    """Query rows of an item, GQA groups packed: a kernel's tile height."""


@dataclass(frozen=True, slots=True)
class WorkShape:
    """What work is cut by. `tile` query rows, a multiple of 16; pieces of at most `piece_keys` keys."""

    num_kv_heads: int
    group_size: int
    page_size: int
    tile: int
    piece_keys: int


def plan_work(
    ranges: Sequence[PagedRange], num_rows: int, shape: WorkShape, device: torch.device | str = "cpu"
) -> PagedWork:
    """Cuts ranges into items. Tiles of one range over one piece and head follow each other: they read the same keys.

    Raises ValueError for an empty range, a row outside 0 … num_rows, or a GQA group that no tile holds.
    """
    per_tile = shape.tile // shape.group_size
    if per_tile < 1:
        raise ValueError(f"a GQA group of {shape.group_size} does not fit a tile of {shape.tile}")
    items: list[tuple[int, ...]] = []
    rows: list[int] = []
    offsets: list[int] = []
    pages: list[int] = []
    parts_of_row: list[list[int]] = [[] for _ in range(num_rows)]
    num_parts = 0
    for r in ranges:
        _check(r, num_rows, shape)
        for start, end in pieces(r.start, r.end, shape):
            tiles = [(first, min(per_tile, len(r.rows) - first)) for first in range(0, len(r.rows), per_tile)]
            for head in range(shape.num_kv_heads):
                items += [
                    (head, len(rows) + first, count, len(pages), start, end, num_parts + first, 0)
                    for first, count in tiles
                ]
            for i, row in enumerate(r.rows):
                parts_of_row[row].append(num_parts + i)
            num_parts += len(r.rows)
        rows += r.rows
        offsets += r.offsets
        pages += r.pages
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
        pages=ints(pages),
        part_starts=ints(starts),
        parts=ints([part for parts in parts_of_row for part in parts]),
        num_parts=num_parts,
        tile=shape.tile,
    )


def pieces(start: int, end: int, shape: WorkShape) -> list[tuple[int, int]]:
    """Keys `start` … `end` in pieces of about equal length, cut between pages."""
    num_pieces = -(-(end - start) // shape.piece_keys)
    page = shape.page_size
    cuts = [(start + (end - start) * i // num_pieces) // page * page for i in range(1, num_pieces)]
    bounds = [start, *(cut for cut in dict.fromkeys(cuts) if start < cut < end), end]
    return list(zip(bounds, bounds[1:], strict=False))


def _check(r: PagedRange, num_rows: int, shape: WorkShape) -> None:
    if not 0 <= r.start < r.end <= len(r.pages) * shape.page_size:
        raise ValueError(f"keys {r.start} … {r.end} of {len(r.pages)} pages of {shape.page_size}")
    if len(r.rows) != len(r.offsets) or not r.rows:
        raise ValueError(f"{len(r.rows)} rows at {len(r.offsets)} offsets")
    if min(r.rows) < 0 or max(r.rows) >= num_rows:
        raise ValueError(f"rows {min(r.rows)} … {max(r.rows)} of {num_rows}")
