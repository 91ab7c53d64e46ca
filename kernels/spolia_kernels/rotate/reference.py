"""Rotary rotation, in the words of its definition."""

from __future__ import annotations

import torch
from torch import Tensor

from spolia_kernels.precision import compute_dtype
from spolia_kernels.rotate.table import RotaryTable


def rotate_ref(x: Tensor, positions: Tensor, table: RotaryTable) -> Tensor:
    """Computes `rotate` from the frequencies themselves, angles in float64; see there for shapes and meaning.

    Uses `table` for its frequencies only. For float64 `x` every step is float64.
    """
    dtype = compute_dtype(x.dtype)
    half = table.rotary_dim // 2
    angles = torch.outer(positions.to(torch.float64), table.inv_freq)  # [num_rows, rotary_dim / 2]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    first, second, rest = (
        x[..., :half].to(dtype),
        x[..., half : 2 * half].to(dtype),
        x[..., 2 * half :].to(dtype),
    )
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)
