"""Small operations between a layer's matrix products, each one pass over its rows.

CUDA: Triton kernels. CPU, float32: machine code of our own (`native/each_row.py`). Elsewhere: `reference.py`. Rows and
width are free.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spolia_kernels.fused.norm import RmsNorm
from spolia_kernels.fused.reference import add_rms_norm_ref, silu_mul_ref
from spolia_kernels.native import each_row

__all__ = ["RmsNorm", "add_rms_norm", "silu_mul"]


def add_rms_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Adds `delta` to `hidden` in place; returns weight · hidden / sqrt(mean(hidden²) + eps), as transformers rounds.

    `hidden` and `delta` [num_rows, width], contiguous; `weight` [width]. Without `delta` nothing is added.
    """
    if hidden.device.type != "cuda":
        return add_rms_norm_ref(hidden, delta, weight, eps)
    from spolia_kernels.fused import launch

    return launch.add_rms_norm(hidden, delta, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of `gate_up` [num_rows, 2 · width], contiguous: gate in its first half; [num_rows, width]."""
    if gate_up.device.type != "cuda":
        found = each_row.silu_mul(gate_up)
        return silu_mul_ref(gate_up) if found is None else found
    from spolia_kernels.fused import launch

    out = torch.empty((gate_up.shape[0], gate_up.shape[1] // 2), dtype=gate_up.dtype, device=gate_up.device)
    launch.silu_mul(gate_up, out)
    return out
