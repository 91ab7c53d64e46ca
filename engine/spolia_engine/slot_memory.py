"""A device's KV memory: taken once, at start, in slots, and given out in pages.

Layer by layer it is what the paged kernels read (`PagedKv`). Pages that follow each other are a piece of an extent,
with memory as on a CPU, `[layer][kv_head][token][head_dim]`, only that a head's tokens lie further from the next's.

Free pages need not be side by side to be of use: an extent takes as few ranges as there are. Nothing is moved, so
graphs and whoever computes in another thread find KV where they were told it lies. Kernels know no pieces: a step's
plan has a span for each, a tail's pages are a list anyway, and a prompt's pass merges one partial more. What pieces
cost is that: attention in shorter stretches. So the pool lets a little more of the cache go than it must rather than
have many pieces (`PIECE_PAGES`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from spolia_core.chunk_object import KvShape
from spolia_core.errors import InvalidRequest, NotSupported
from spolia_engine.extent import Piece
from spolia_engine.page_arena import PageArena, PageRange
from spolia_kernels.paged import PagedKv

DEVICE_BLOCK_SIZE = 16
"""Tokens of a page, and so of a block: the least that the paged kernels read."""
PIECE_PAGES = 16
"""Pages of a piece, on average, below which the cache makes room for longer ones: 256 tokens are two of the shortest
stretches that attention is cut into anyway (`MIN_PIECE`). A pool of 2,048 pages, kept full of extents of 8 … 64 (the
test of pieces), hands them out in 2.2 pieces of 17 pages on average, without it in 4.3 of 9."""


class SlotMemory:
    """Slots for `num_pages` pages in every layer. Not thread-safe: the pool is."""

    def __init__(
        self, shape: KvShape, *, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """Raises `NotSupported` for K and V of unequal widths, `InvalidRequest` for pages that kernels cannot read."""
        if shape.head_dim != shape.v_dim:
            raise NotSupported(
                f"keys of {shape.head_dim} and values of {shape.v_dim} numbers; a device's slots hold equal ones",
                field="head_dim",
            )
        if page_size < DEVICE_BLOCK_SIZE or page_size & (page_size - 1):
            raise InvalidRequest(
                f"block_size is {page_size}: on a device a block is a page, a power of two from {DEVICE_BLOCK_SIZE} on",
                field="block_size",
                limit=f"a power of two ≥ {DEVICE_BLOCK_SIZE}",
                actual=str(page_size),
            )
        self.page_size = page_size
        self.arena = PageArena(num_pages)
        size = (shape.num_layers, shape.num_kv_heads, num_pages * page_size, shape.head_dim)
        # Zeros: kernels may read slots that nobody wrote, and hide them behind a mask.
        self._key, self._value = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
        self.layers = tuple(PagedKv(k, v, page_size) for k, v in zip(self._key, self._value, strict=True))

    def take(self, num_pages: int) -> list[PageRange]:
        """Pages in as few ranges as there are; so many must be free."""
        return self.arena.take(num_pages)

    def is_in_pieces(self, num_pages: int) -> bool:
        """Whether so many pages, which must be free, would come in more pieces than are as good as one."""
        return self.arena.num_ranges(num_pages) > -(-num_pages // PIECE_PAGES)

    def pieces(self, ranges: Sequence[PageRange], num_tokens: int, skipped: int = 0) -> tuple[Piece, ...]:
        """Pieces of `num_tokens` tokens in these ranges' slots, but for the first `skipped`."""
        pieces: list[Piece] = []
        start = -skipped
        for page, count in ranges:
            first, end = max(start, 0), min(start + count * self.page_size, num_tokens)
            slot = page * self.page_size + first - start
            slots = slice(slot, slot + end - first)
            pieces.append(Piece(first, self._key[:, :, slots], self._value[:, :, slots], slot))
            start += count * self.page_size
        return tuple(pieces)

    def pages_of(self, pieces: Iterable[Piece]) -> list[PageRange]:
        """The pages that all of these pieces' tokens lie in."""
        found: list[PageRange] = []
        for piece in pieces:
            assert piece.first_slot is not None, "all of a device's memory is slots"
            first, last = piece.first_slot // self.page_size, (piece.first_slot + piece.end - piece.start - 1)
            found.append((first, last // self.page_size - first + 1))
        return found

    def give_back(self, pieces: Iterable[Piece]) -> None:
        """Gives the pages of an extent's pieces back."""
        for first, count in self.pages_of(pieces):
            self.arena.give_back(first, count)
