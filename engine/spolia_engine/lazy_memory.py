"""Memory that is zero and takes no pages before they are written."""

from __future__ import annotations

import math
import mmap
import sys

import torch
from torch import Tensor

GIVES_BACK = sys.platform == "linux"
"""Elsewhere a page that is not needed need not be zero when it is looked at again."""


class LazyZeros:
    """Zeros of a size, as `tensor`. On a CPU only addresses are taken: `torch.zeros` would write, and so take, every
    page. The memory goes with the last tensor that looks at it.
    """

    def __init__(self, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        count = math.prod(size)
        self._map: mmap.mmap | None = None
        if device.type != "cpu" or count == 0:
            self.tensor = torch.zeros(size, dtype=dtype, device=device)
            return
        self._map = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.tensor = torch.frombuffer(self._map, dtype=dtype).view(size)

    def clear(self, part: Tensor) -> None:
        """Makes a contiguous part of the tensor zero again; whole pages in it are given back."""
        if self._map is None or not GIVES_BACK:
            part.zero_()
            return
        flat, start = part.view(-1), part.storage_offset() * part.itemsize
        end = start + part.nbytes
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if first >= last:
            part.zero_()
            return
        flat[: (first - start) // part.itemsize].zero_()
        flat[(last - start) // part.itemsize :].zero_()
        self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
