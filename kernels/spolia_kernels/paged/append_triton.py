"""Writing new KV into slots, the keys rotated on the way: one program per row and KV head."""

from __future__ import annotations

import triton
import triton.language as tl

from spolia_kernels.paged.shared_triton import turned_halves


@triton.jit
def append_paged_kernel(
    new_key,
    new_value,
    key,
    value,
    num_slots,
    slots,
    positions,
    cos,
    sin,
    stride_row,
    HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = head.to(tl.int64) * num_slots + tl.load(slots + row)
    d = tl.arange(0, HALF)[None, :]
    wide = tl.arange(0, 2 * HALF)
    source = row * stride_row + head * (2 * HALF)
    angle = tl.load(positions + row) * HALF + d
    first, second = turned_halves(new_key + source + d, angle, cos, sin, 1.0, angle >= 0, HALF)
    dtype = key.dtype.element_ty
    tl.store(key + slot * (2 * HALF) + d, first.to(dtype))
    tl.store(key + slot * (2 * HALF) + HALF + d, second.to(dtype))
    tl.store(value + slot * (2 * HALF) + wide, tl.load(new_value + source + wide).to(dtype))
