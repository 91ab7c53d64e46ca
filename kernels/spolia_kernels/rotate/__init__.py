"""Rotate: turns queries or keys to a position.

float64 (oracles): the reference, with angles and their cosines in float64. Everything else, on every device:
a lookup in the `RotaryTable` and a `Rotation`. On a GPU the rotation of queries belongs into the
attention kernel, where the query tile is loaded; this operation is what it must equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spolia_kernels.rotate.reference import rotate_ref
from spolia_kernels.rotate.rotation import Rotation
from spolia_kernels.rotate.table import RotaryTable

__all__ = ["RotaryTable", "Rotation", "rotate", "rotate_ref"]


def rotate(x: Tensor, positions: Tensor, table: RotaryTable) -> Tensor:
    """Returns R(positions) x: row r of every head turned to position `positions[r]`.

        angle_i = position * inv_freq_i
        y_i = x_i cos(angle_i) - x_{i+h} sin(angle_i);   y_{i+h} = x_{i+h} cos(angle_i) + x_i sin(angle_i)

    for i < h = rotary_dim / 2: the half-split ("rotate_half") layout of Llama and NeoX, over the first
    rotary_dim dimensions; the rest pass unchanged. Positions may be negative, and R(a) R(b) = R(a + b), so a
    query at position p sees a chunk standing at offset d, its keys rotated to chunk-local positions, when it
    is rotated to p - d: (R(p) q) . (R(d + j) k) = (R(p - d) q) . (R(j) k).

    x [num_heads, num_rows, head_dim], left unchanged; positions int64 [num_rows]. A new tensor of x's dtype,
    computed in float32 (float64 for float64 x). Raises ValueError where shapes or dtypes do not fit.

    Source: RoFormer (arXiv 2104.09864) §3.4.2; the query-side offset is Spolia's reading of EPIC (arXiv
    2410.15332) §4.
    """
    if x.ndim != 3 or x.shape[2] != table.head_dim:
        raise ValueError(f"x is [num_heads, num_rows, {table.head_dim}]; got {tuple(x.shape)}")
    if positions.shape != x.shape[1:2] or positions.dtype != torch.int64:
        raise ValueError(
            f"positions is int64 [{x.shape[1]}], one per row; got {positions.dtype} {tuple(positions.shape)}"
        )
    if x.dtype == torch.float64:
        return rotate_ref(x, positions, table)
    return Rotation.to(positions, table)(x)
