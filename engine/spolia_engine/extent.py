"""An extent: KV memory for some tokens, in one piece or in several."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from spolia_engine.slab import Slot


class BlockState(Enum):
    """Where a block stands in the ledger."""

    FREE = "free"
    """Nobody's."""
    REFERENCED = "referenced"
    """Read or written by at least one sequence."""
    CACHED = "cached"
    """Holds chunks nobody reads now; goes when room is needed, least recently used first."""
    IN_TRANSFER = "in_transfer"
    """Bytes are arriving from another node."""
    LENT = "lent"
    """Holds a peer's runs under a lease."""


ALLOWED_MOVES = {
    (BlockState.FREE, BlockState.REFERENCED),
    (BlockState.FREE, BlockState.IN_TRANSFER),
    (BlockState.IN_TRANSFER, BlockState.REFERENCED),
    (BlockState.IN_TRANSFER, BlockState.FREE),
    (BlockState.REFERENCED, BlockState.CACHED),
    (BlockState.REFERENCED, BlockState.FREE),
    (BlockState.CACHED, BlockState.REFERENCED),
    (BlockState.CACHED, BlockState.FREE),
}
"""From one state to another; the pool draws them."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Tokens `start` … of an extent that lie side by side, as many as its tensors hold.

    `key` is [num_layers, num_kv_heads, num_tokens, head_dim], `value` the same with v_dim. `first_slot` is where they
    lie in the memory of a device; None for memory of their own.
    """

    start: int
    key: Tensor
    value: Tensor
    first_slot: int | None = None

    @property
    def end(self) -> int:
        """Behind its last token."""
        return self.start + self.key.shape[2]

    def part(self, start: int, end: int) -> Piece:
        """Its tokens `start` … `end`, counted in the extent."""
        if (start, end) == (self.start, self.end):
            return self
        tokens = slice(start - self.start, end - self.start)
        slot = None if self.first_slot is None else self.first_slot + tokens.start
        return Piece(start, self.key[:, :, tokens], self.value[:, :, tokens], slot)


class Extent:
    """KV memory for `capacity` tokens. The pool owns it; whoever holds a reference may use it.

    It is one piece on a CPU; in the memory of a device, several where no room for one was free. Pieces may come to lie
    elsewhere, with the same numbers in them: look them up, do not keep them. There are none once the extent is free.
    """

    __slots__ = (
        "capacity",
        "chunk_ids",
        "num_blocks",
        "num_spare",
        "pieces",
        "ref_count",
        "slot",
        "state",
        "used_at",
    )

    def __init__(self, pieces: tuple[Piece, ...], num_blocks: int, slot: Slot | None = None) -> None:
        self.pieces = pieces
        """In order, without gap."""
        self.capacity = pieces[-1].end
        self.num_blocks = num_blocks
        self.state = BlockState.FREE
        self.ref_count = 0
        self.used_at = 0
        """When it was last released by somebody who counts (see `Pool.sparing_cache`), on the pool's own count."""
        self.chunk_ids: set[bytes] = set()
        """Chunks registered in this extent (`spolia_engine.resident`); with any, it is cached when released."""
        self.slot = slot
        """Where a sequence writes it, or reads it beside what it writes; None for memory of its own."""
        self.num_spare = 0
        """Tokens that a tail holds in the last block of what stands before it."""

    @property
    def key(self) -> Tensor:
        """All keys of an extent in one piece, a view."""
        return self._whole.key

    @property
    def value(self) -> Tensor:
        """All values of an extent in one piece, a view."""
        return self._whole.value

    @property
    def _whole(self) -> Piece:
        assert len(self.pieces) == 1, f"an extent in {len(self.pieces)} pieces has no one tensor"
        return self.pieces[0]

    def parts(self, start: int, end: int) -> Iterator[Piece]:
        """Tokens `start` … `end`, piece by piece."""
        assert self.pieces, "the extent's memory went"
        for piece in self.pieces:
            low, high = max(start, piece.start), min(end, piece.end)
            if low < high:
                yield piece.part(low, high)

    def read(self, layer: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values of tokens `start` … `end`, [num_kv_heads, num_tokens, …]: to be read only, since
        what lies in pieces is copied together.
        """
        found = [(part.key[layer], part.value[layer]) for part in self.parts(start, end)]
        if len(found) == 1:
            return found[0]
        key, value = zip(*found, strict=True)
        return torch.cat(key, 1), torch.cat(value, 1)

    def write(self, layers: int | slice, start: int, key: Tensor, value: Tensor) -> None:
        """Copies `key` and `value` [layers, num_kv_heads, num_tokens, …], without layers for a single one, into tokens
        `start` … .
        """
        for part in self.parts(start, start + key.shape[-2]):
            tokens = slice(part.start - start, part.end - start)
            part.key[layers].copy_(key[..., tokens, :])
            part.value[layers].copy_(value[..., tokens, :])

    def slots(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(first, end) slots of tokens `start` … `end`, piece by piece, in the memory of a device."""
        assert self.pieces, "the extent's memory went"
        for piece in self.pieces:
            assert piece.first_slot is not None, "what a step reads lies in the device's slots"
            low, high = max(start, piece.start), min(end, piece.end)
            if low < high:
                yield piece.first_slot + low - piece.start, piece.first_slot + high - piece.start
