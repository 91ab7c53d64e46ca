"""The memory of the RAM tier: one mapping, cut into blocks, taken at start and never grown.

An object is a list of blocks, wherever they are free, so memory cannot fragment and the process never holds more than
the budget. A block that has been used is used again before a fresh one: its pages are there already (filling 16 MB of
them takes 1.5 ms, of fresh ones 10 ms).
"""

from __future__ import annotations

import mmap
from array import array
from bisect import bisect_right
from collections.abc import Iterator

BLOCK_BYTES = 16 << 10
"""Small enough that the last block of an object wastes little, large enough that a frame of 512 KiB is 32 of them."""


class Extent:
    """Memory of one object: `size` bytes in runs of blocks. Views of it must not outlive its `Arena.free`."""

    def __init__(self, view: memoryview, blocks: array[int], block_bytes: int, size: int) -> None:
        self._view = view
        self.blocks = blocks
        self.size = size
        self._runs = _runs_of(blocks, block_bytes)
        self._starts = [0]
        for _, length in self._runs:
            self._starts.append(self._starts[-1] + length)

    def __len__(self) -> int:
        return self.size

    def pieces(self, start: int, end: int) -> Iterator[memoryview]:
        """Bytes `start` … `end` as views of the arena, in order; cut at the end of the object."""
        end = min(end, self.size)
        run = bisect_right(self._starts, start) - 1
        while start < end:
            base, length = self._runs[run]
            inside = start - self._starts[run]
            num_bytes = min(length - inside, end - start)
            yield self._view[base + inside : base + inside + num_bytes]
            start += num_bytes
            run += 1

    def read(self, start: int, end: int) -> bytes:
        """A copy of bytes `start` … `end`, cut at the end of the object."""
        return b"".join(self.pieces(start, end))

    def write(self, start: int, data: bytes | bytearray | memoryview) -> None:
        """Copies `data` to `start`. The caller has checked that it fits."""
        assert start + len(data) <= self.size
        view, offset = memoryview(data), 0
        for piece in self.pieces(start, start + len(data)):
            piece[:] = view[offset : offset + len(piece)]
            offset += len(piece)


class Arena:
    """`budget_bytes` of memory in blocks; a remainder smaller than a block is left out. Used from one thread."""

    def __init__(self, budget_bytes: int, block_bytes: int = BLOCK_BYTES) -> None:
        self.block_bytes = min(block_bytes, budget_bytes)
        self.num_blocks = budget_bytes // self.block_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._map = mmap.mmap(-1, self.num_blocks * self.block_bytes, flags=flags)
        self._view = memoryview(self._map)
        self._used_before = array("I")
        self._next_fresh = 0

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all blocks."""
        return self.num_blocks * self.block_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes of the blocks nobody has."""
        return (self.num_blocks - self._next_fresh + len(self._used_before)) * self.block_bytes

    def charge(self, size: int) -> int:
        """What an object of `size` bytes takes: whole blocks."""
        return -(-size // self.block_bytes) * self.block_bytes

    def take(self, size: int) -> Extent | None:
        """Memory for `size` bytes with whatever was there before in it; None when too few blocks are free."""
        wanted = self.charge(size) // self.block_bytes
        if wanted * self.block_bytes > self.free_bytes:
            return None
        num_reused = min(wanted, len(self._used_before))
        blocks = array("I", sorted(self._used_before[len(self._used_before) - num_reused :]))
        del self._used_before[len(self._used_before) - num_reused :]
        blocks.extend(range(self._next_fresh, self._next_fresh + wanted - num_reused))
        self._next_fresh += wanted - num_reused
        return Extent(self._view, blocks, self.block_bytes, size)

    def free(self, extent: Extent) -> None:
        """Gives the blocks back."""
        self._used_before.extend(extent.blocks)
        extent.blocks = array("I")


def _runs_of(blocks: array[int], block_bytes: int) -> list[tuple[int, int]]:
    """Neighbouring blocks as (first byte, bytes)."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        start = block * block_bytes
        if runs and sum(runs[-1]) == start:
            runs[-1] = (runs[-1][0], runs[-1][1] + block_bytes)
        else:
            runs.append((start, block_bytes))
    return runs
