"""Memory that is zero and takes no pages before they are written."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor


def lazy_zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros of a size. On a CPU only addresses are taken: `torch.zeros` would write, and so take, every page.

    The memory goes with the last tensor that looks at it.
    """
    count = math.prod(size)
    if device.type != "cpu" or count == 0:
        return torch.zeros(size, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype).view(size)
