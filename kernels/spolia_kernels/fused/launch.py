"""Launches the small operations. Imports Triton."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from spolia_kernels.fused.fused_triton import add_rms_norm_kernel, silu_mul_kernel


def add_rms_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """See `spolia_kernels.fused.add_rms_norm`."""
    num_rows, width = hidden.shape
    out = torch.empty_like(hidden)
    add_rms_norm_kernel[(num_rows,)](
        hidden,
        hidden if delta is None else delta,
        weight,
        out,
        width,
        eps,
        HAS_DELTA=delta is not None,
        WIDTH=triton.next_power_of_2(width),
        num_warps=8 if width > 2048 else 4,
    )
    return out


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """See `spolia_kernels.fused.silu_mul`; writes `out`."""
    num_rows, width = out.shape
    block = 1024
    silu_mul_kernel[(num_rows, triton.cdiv(width, block))](gate_up, out, width, BLOCK=block)
