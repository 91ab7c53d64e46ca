"""Batches over paged KV of random numbers: rows that share spans, each with a tail of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spolia_kernels.paged import Angles, PagedKv, PagedRange, PagedWork, Tails, WorkShape, plan_work

DEVICE = "cuda"
PAGE = 64


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

    def floor(self, heads: Heads) -> tuple[float, float]:
        """Bytes and operations of one layer's attention: every key once, queries and answers once."""
        own = self.suffix + 1
        num_bytes = heads.key_bytes * (self.shared + self.rows * own)
        num_bytes += 2 * self.rows * heads.num_q_heads * heads.head_dim * 2
        return num_bytes, 4.0 * self.rows * heads.num_q_heads * heads.head_dim * (self.shared + own)


def angles(head_dim: int, max_position: int) -> Angles:
    """Plain RoPE, base 500,000."""
    inv_freq = 500000.0 ** -(torch.arange(head_dim // 2, dtype=torch.float64) / (head_dim // 2))
    turned = torch.outer(torch.arange(max_position, dtype=torch.float64), inv_freq)
    return Angles(turned.cos().float().to(DEVICE), turned.sin().float().to(DEVICE))


def random_kv(num_pages: int, heads: Heads) -> PagedKv:
    """Pages of normal numbers."""
    shape = (num_pages, heads.num_kv_heads, PAGE, heads.head_dim)
    key, value = (torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_() for _ in range(2))
    return PagedKv(key, value)


def tails_of(point: Point, first_page: int, room: int) -> Tails:
    """A tail for each row behind what is shared; with `room` more tokens to come."""
    per_row = -(-(point.suffix + 1 + room) // PAGE)
    pages = torch.arange(first_page, first_page + point.rows * per_row, dtype=torch.int32).reshape(point.rows, per_row)
    starts = torch.full((point.rows,), point.shared, dtype=torch.int32)
    return Tails(pages.to(DEVICE), starts.to(DEVICE), (starts + point.suffix).to(DEVICE))


def num_pages(point: Point, room: int) -> int:
    """Pages that a point takes, its span's first."""
    return -(-point.shared // PAGE) + point.rows * -(-(point.suffix + 1 + room) // PAGE)


def shared_ranges(point: Point, documents: Sequence[Sequence[int]] | None = None) -> list[PagedRange]:
    """What all rows read. `documents[r]` is row r's order of as many equal documents; without it there is one."""
    rows = tuple(range(point.rows))
    if documents is None:
        return [PagedRange(tuple(range(-(-point.shared // PAGE))), 0, point.shared, rows, (0,) * point.rows)]
    length = point.shared // len(documents[0])
    per = length // PAGE
    return [
        PagedRange(
            tuple(range(d * per, (d + 1) * per)),
            0,
            length,
            rows,
            tuple(order.index(d) * length for order in documents),
        )
        for d in range(len(documents[0]))
    ]


def private_ranges(point: Point) -> list[PagedRange]:
    """The same, every row reading for itself."""
    pages = tuple(range(-(-point.shared // PAGE)))
    return [PagedRange(pages, 0, point.shared, (row,), (0,)) for row in range(point.rows)]


def tile_for(rows: int, group: int) -> int:
    """Tile height for a range that so many rows read."""
    return min(128, max(16, 1 << (rows * group - 1).bit_length()))


def planned(ranges: Sequence[PagedRange], rows: int, heads: Heads, tile: int, num_processors: int) -> PagedWork:
    """Work in pieces that keep every processor busy a few times over, where the keys suffice for that."""
    per_tile = tile // heads.group
    tiles = sum(-(-len(r.rows) // per_tile) for r in ranges) * heads.num_kv_heads
    longest = max(r.end - r.start for r in ranges)
    wanted = max(1, (4 if tile <= 16 else 2) * num_processors // tiles)
    piece = max(512 if tile > 16 else 256, -(-longest // wanted))
    shape = WorkShape(heads.num_kv_heads, heads.group, PAGE, tile, piece)
    return plan_work(ranges, rows, shape, DEVICE)


def random_query(rows: int, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of the rows as the model's one product gives them: side by side, key unrotated."""
    total = heads.num_q_heads + 2 * heads.num_kv_heads
    joined = torch.randn(rows, total, heads.head_dim, device=DEVICE).to(torch.bfloat16)
    key, value = joined[:, heads.num_q_heads :].chunk(2, 1)
    return joined[:, : heads.num_q_heads], key, value
