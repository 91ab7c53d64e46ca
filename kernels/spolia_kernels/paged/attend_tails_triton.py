"""Attention over private tails on a CUDA device, and the merge with what the spans gave: one program per row and KV head.

The running softmax begins with the row's partials in the place of nothing, so the merge costs no launch and no memory
of its own, and what is written is the answer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spolia_kernels.paged.device_code import load_turned, scan

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_tails_kernel(
    query,
    key,
    value,
    tail_pages,
    tail_starts,
    positions,
    num_rows,
    part_starts,
    parts,
    part_out,
    part_lse,
    cos,
    sin,
    result,
    sm_scale,
    stride_row,
    stride_page,
    max_pages,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    if row < tl.load(num_rows):
        d = tl.arange(0, 2 * HALF)
        m = tl.arange(0, TILE)
        seen = m < GROUP
        q_head = head * GROUP + m
        position = tl.load(positions + row)
        length = position - tl.load(tail_starts + row) + 1
        q1, q2 = load_turned(
            query, stride_row, row + m * 0, q_head, position + m * 0, cos, sin, sm_scale * LOG2_E, seen, HALF
        )

        top = tl.full([TILE], float("-inf"), tl.float32)
        total = tl.zeros([TILE], tl.float32)
        out = tl.zeros([TILE, 2 * HALF], tl.float32)
        in_head = head.to(tl.int64) * (PAGE * 2 * HALF)
        pages = tail_pages + row.to(tl.int64) * max_pages
        whole = length // KEYS * KEYS
        top, total, out = scan(
            q1, q2, top, total, out, key + in_head, value + in_head, pages, 0, whole, 0, length,
            stride_page, HALF, PAGE, KEYS, False, PRECISION,
        )  # fmt: skip
        top, total, out = scan(
            q1, q2, top, total, out, key + in_head, value + in_head, pages, whole, length, 0, length,
            stride_page, HALF, PAGE, KEYS, True, PRECISION,
        )  # fmt: skip

        for index in range(tl.load(part_starts + row), tl.load(part_starts + row + 1)):
            at = tl.load(parts + index).to(tl.int64) * (NUM_KV_HEADS * GROUP) + q_head
            lse = tl.load(part_lse + at, mask=seen, other=float("-inf")) * LOG2_E
            # The row's own key is always there, so the maximum is a number, whatever a partial is.
            new_top = tl.maximum(top, lse)
            keep = tl.math.exp2(top - new_top)
            weight = tl.math.exp2(lse - new_top)
            part = tl.load(part_out + at[:, None] * (2 * HALF) + d[None, :], mask=seen[:, None], other=0.0)
            total = total * keep + weight
            out = out * keep[:, None] + tl.where(weight[:, None] > 0.0, part * weight[:, None], 0.0)
            top = new_top

        at = row.to(tl.int64) * stride_row_out(NUM_KV_HEADS, GROUP, HALF) + q_head * (2 * HALF)
        tl.store(
            result + at[:, None] + d[None, :],
            (out / total[:, None]).to(result.dtype.element_ty),
            mask=seen[:, None],
        )


@triton.jit
def stride_row_out(NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr):
    """Numbers of one row of the result."""
    return NUM_KV_HEADS * GROUP * 2 * HALF
