"""Adding and norming a row, and gating one: a program per row, or per block of one."""

from __future__ import annotations

import triton
import triton.language as tl


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
