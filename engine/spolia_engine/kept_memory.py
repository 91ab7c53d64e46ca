"""Memory that extents had, kept for the next of the same size.

What goes back to the system comes again page by page, each cleared first, and on a virtual machine taken from its host
as well. 200 MB written into kept memory took 11 ms (10 … 32), into fresh huge pages 28 (21 … 478), into fresh small
ones 79 (22 … 94; 2 cores of an AMD EPYC, a guest). Chunks of a fixed length come and go by the hundred, so the next is
often as large as the last that went.
"""

from __future__ import annotations

import math
import weakref
from collections import deque

import torch
from torch import Tensor

MIN_BYTES = 2 << 20
"""Of a tensor. What is smaller the allocator keeps itself."""


class KeptMemory:
    """Hands out memory on a CPU, uninitialised, and takes it back when nobody looks at it any more.

    Called under its owner's lock, but for the return of memory: that comes from whichever thread lets go of a tensor.
    """

    def __init__(self) -> None:
        self._returned: deque[Tensor] = deque()
        """By threads that hold no lock: appended to, and emptied by `_collect`, both of which are atomic."""
        self._kept: list[tuple[int, Tensor]] = []
        """Bytes of each, oldest first."""
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """What is kept now."""
        self._collect()
        return self._num_bytes

    def take(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As `torch.empty`, in memory that is kept where there is some of that length."""
        num_bytes = math.prod(size) * dtype.itemsize
        if num_bytes < MIN_BYTES:
            return torch.empty(size, dtype=dtype)
        memory = self._kept_of(num_bytes)
        if memory is None:
            memory = torch.empty(num_bytes, dtype=torch.uint8)
        # The tensor, and every view of it, holds this very array, and goes before the memory does.
        lent = memory.numpy()
        weakref.finalize(lent, self._returned.append, memory).atexit = False
        return torch.from_numpy(lent).view(dtype).view(size)

    def trim(self, max_bytes: int) -> None:
        """Gives all but `max_bytes` back to the system, oldest first."""
        self._collect()
        num_gone = 0
        while self._num_bytes > max_bytes:
            self._num_bytes -= self._kept[num_gone][0]
            num_gone += 1
        del self._kept[:num_gone]

    def _kept_of(self, num_bytes: int) -> Tensor | None:
        """The youngest of that length."""
        self._collect()
        for index in reversed(range(len(self._kept))):
            if self._kept[index][0] == num_bytes:
                self._num_bytes -= num_bytes
                return self._kept.pop(index)[1]
        return None

    def _collect(self) -> None:
        while self._returned:
            memory = self._returned.popleft()
            self._kept.append((memory.nbytes, memory))
            self._num_bytes += memory.nbytes
