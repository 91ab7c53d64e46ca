"""Batches over paged KV of random numbers: rows that share spans, each with a tail of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spolia_kernels.paged import Angles, PagedKv, PagedWork, Rows, SlotSpan, Tails, WorkShape, piece_keys, plan_work

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Without a device these batches serve tests only."""
PAGE = 64


def num_processors() -> int:
    """Multiprocessors of the device."""
    return torch.cuda.get_device_properties(0).multi_processor_count if DEVICE == "cuda" else 4


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention's shape."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int = 128

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def key_bytes(self) -> int:
        """Of one token's key and value, 16 bits."""
        return 4 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Point:
    """`rows` sequences that share `shared` tokens and have `suffix` of their own before the one that is decoded."""

    rows: int
    shared: int
    suffix: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.shared}+{self.suffix}"

    def floors(self, heads: Heads) -> list[tuple[float, float]]:
        """Bytes and operations of one layer's attention, over what is shared and over what is not: every key once."""
        rows, per_key = self.rows * heads.num_q_heads, 4.0 * heads.head_dim
        travelling = 2.0 * rows * heads.head_dim * 2  # queries in, answers out
        own = self.suffix + 1
        return [
            (heads.key_bytes * self.shared, per_key * rows * self.shared),
            (heads.key_bytes * self.rows * own + travelling, per_key * rows * own),
        ]


def angles(head_dim: int, max_position: int) -> Angles:
    """Plain RoPE, base 500,000."""
    inv_freq = 500000.0 ** -(torch.arange(head_dim // 2, dtype=torch.float64) / (head_dim // 2))
    turned = torch.outer(torch.arange(max_position, dtype=torch.float64), inv_freq)
    return Angles(turned.cos().float().to(DEVICE), turned.sin().float().to(DEVICE))


def random_kv(num_pages: int, heads: Heads) -> PagedKv:
    """Pages of normal numbers."""
    shape = (heads.num_kv_heads, num_pages * PAGE, heads.head_dim)
    key, value = (torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_() for _ in range(2))
    return PagedKv(key, value, PAGE)


def tails_of(point: Point, first_page: int, room: int) -> Tails:
    """A tail for each row behind what is shared; with `room` more tokens to come."""
    per_row = -(-(point.suffix + 1 + room) // PAGE)
    pages = torch.arange(first_page, first_page + point.rows * per_row, dtype=torch.int32).reshape(point.rows, per_row)
    starts = torch.full((point.rows,), point.shared, dtype=torch.int32)
    return Tails(pages.to(DEVICE), starts.to(DEVICE), (starts + point.suffix).to(DEVICE))


def num_pages(point: Point, room: int) -> int:
    """Pages that a point takes, its span's first."""
    return -(-point.shared // PAGE) + point.rows * -(-(point.suffix + 1 + room) // PAGE)


def shared_spans(point: Point, orders: Sequence[Sequence[int]] | None = None) -> list[SlotSpan]:
    """What all rows read. `orders[r]` is row r's order of as many equal documents; without it there is one prefix."""
    rows = tuple(range(point.rows))
    if orders is None:
        return [SlotSpan(0, point.shared, rows, (0,) * point.rows)]
    length = point.shared // len(orders[0])
    return [
        SlotSpan(d * length, (d + 1) * length, rows, tuple(order.index(d) * length for order in orders))
        for d in range(len(orders[0]))
    ]


def private_spans(point: Point) -> list[SlotSpan]:
    """The same, every row reading for itself."""
    return [SlotSpan(0, point.shared, (row,), (0,)) for row in range(point.rows)]


def tile_for(rows: int, group: int) -> int:
    """Tile height for a range that so many rows read."""
    return min(64, max(16, 1 << (rows * group - 1).bit_length()))


def planned(spans: Sequence[SlotSpan], rows: int, heads: Heads, tile: int, num_processors: int) -> PagedWork:
    """Work in pieces that keep every processor busy, where the keys suffice for that."""
    per_tile = tile // heads.group
    num_tiles = sum(-(-len(span.rows) // per_tile) for span in spans) * heads.num_kv_heads
    longest = max(span.end - span.start for span in spans)
    per_processor = 4 if tile <= 16 else 2
    piece = piece_keys(num_tiles, longest, per_processor * num_processors)
    return plan_work(spans, rows, WorkShape(heads.num_kv_heads, heads.group, tile, piece), DEVICE)


def random_rows(rows: int, heads: Heads) -> Rows:
    """Queries and new KV as a model's one product gives them."""
    total = heads.num_q_heads + 2 * heads.num_kv_heads
    return Rows.of(torch.randn(rows, total, heads.head_dim, device=DEVICE).to(torch.bfloat16), heads.num_q_heads)
