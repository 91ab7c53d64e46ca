"""The small operations as Triton kernels. Imports Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def add_rms_norm_kernel(hidden, delta, weight, out, width, eps, HAS_DELTA: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    inside = d < width
    at = row * width + d
    x = tl.load(hidden + at, mask=inside, other=0.0)
    if HAS_DELTA:
        x = x + tl.load(delta + at, mask=inside, other=0.0)
        tl.store(hidden + at, x, mask=inside)
    wide = x.to(tl.float32)
    wide = wide * tl.math.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    dtype = out.dtype.element_ty
    tl.store(out + at, tl.load(weight + d, mask=inside, other=0.0) * wide.to(dtype), mask=inside)


@triton.jit
def silu_mul_kernel(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < width
    gate = tl.load(gate_up + row * (2 * width) + d, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * width) + width + d, mask=inside, other=0.0)
    dtype = out.dtype.element_ty
    tl.store(out + row * width + d, (gate / (1.0 + tl.math.exp(-gate))).to(dtype) * up, mask=inside)


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
