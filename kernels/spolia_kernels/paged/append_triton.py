"""Writing the rows' new KV into their tails' pages, the keys rotated on the way: one program per row and KV head."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def append_paged_kernel(
    new_key,
    new_value,
    key,
    value,
    tail_pages,
    tail_starts,
    positions,
    num_rows,
    cos,
    sin,
    stride_row,
    stride_page,
    max_pages,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    if row < tl.load(num_rows):
        position = tl.load(positions + row)
        slot = position - tl.load(tail_starts + row)
        page = tl.load(tail_pages + row.to(tl.int64) * max_pages + slot // PAGE).to(tl.int64)
        target = page * stride_page + (head * PAGE + slot % PAGE) * (2 * HALF)
        source = row.to(tl.int64) * stride_row + head * (2 * HALF)
        d = tl.arange(0, HALF)
        first = tl.load(new_key + source + d).to(tl.float32)
        second = tl.load(new_key + source + HALF + d).to(tl.float32)
        c = tl.load(cos + position * HALF + d)
        s = tl.load(sin + position * HALF + d)
        dtype = key.dtype.element_ty
        tl.store(key + target + d, (first * c - second * s).to(dtype))
        tl.store(key + target + HALF + d, (second * c + first * s).to(dtype))
        wide = tl.arange(0, 2 * HALF)
        tl.store(value + target + wide, tl.load(new_value + source + wide).to(dtype))
