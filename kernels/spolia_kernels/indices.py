"""Checks on index tensors, before anything is read or written through them."""

from __future__ import annotations

import torch
from torch import Tensor


def check_indices(indices: Tensor, size: int, name: str) -> None:
    """Raises ValueError unless `indices` is 1-d int64, IndexError for an index outside 0..size-1.

    The range is not looked at on CUDA, where looking would wait for the device; the device's own assertion holds there.
    """
    if indices.ndim != 1 or indices.dtype != torch.int64:
        raise ValueError(f"{name} is a 1-d int64 tensor; got {indices.ndim}-d {indices.dtype}")
    if indices.device.type == "cpu" and indices.shape[0]:
        low, high = (int(bound) for bound in torch.aminmax(indices))
        if low < 0 or high >= size:
            raise IndexError(f"{name} {low if low < 0 else high} outside 0..{size - 1}")
