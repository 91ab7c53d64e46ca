"""Attention over private tails on a CUDA device, writing the row's own KV first and merging with what the spans gave.

One program per row and KV head. The running softmax begins with the row's own key, which is in registers anyway, goes
on with the row's partials, and then reads the tail: append and merge cost no launch and no memory of their own, no row
is ever empty, and what is written is the layer's answer.

A tile is as high as a GQA group. The matrix unit's is of 16 rows, which the compiler fills up for the products alone:
queries, partials and answers of rows that are not there would be most of a short tail's work.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spolia_kernels.paged.shared_triton import soften, turned_halves

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_tails_kernel(
    query,
    new_key,
    new_value,
    key,
    value,
    num_slots,
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
    max_pages,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    # One wait for what everything else waits for; there is an entry for every program, whether its row is there or not.
    position = tl.load(positions + row)
    length = position - tl.load(tail_starts + row)
    first_part = tl.load(part_starts + row)
    last_part = tl.load(part_starts + row + 1)
    if row < tl.load(num_rows):
        part = tl.load(parts + first_part, mask=first_part < last_part, other=0)
        d = tl.arange(0, HALF)
        wide = tl.arange(0, 2 * HALF)
        m = tl.arange(0, TILE)
        seen = m < GROUP
        q_head = head * GROUP + m
        pages = tail_pages + row * max_pages
        in_head = head.to(tl.int64) * num_slots
        angle = (position * HALF + d)[None, :]

        from_query = query + row * stride_row + q_head[:, None] * (2 * HALF) + d[None, :]
        q1, q2 = turned_halves(from_query, angle, cos, sin, sm_scale * LOG2_E, seen[:, None], HALF)
        q1, q2 = q1.to(query.dtype.element_ty), q2.to(query.dtype.element_ty)
        from_key = new_key + row * stride_row + head * (2 * HALF) + d[None, :]
        k1, k2 = turned_halves(from_key, angle, cos, sin, 1.0, angle >= 0, HALF)
        k1, k2 = k1.to(key.dtype.element_ty), k2.to(key.dtype.element_ty)
        v = tl.load(new_value + row * stride_row + head * (2 * HALF) + wide).to(value.dtype.element_ty)
        slot = in_head + tl.load(pages + length // PAGE) * PAGE + length % PAGE
        tl.store(key + slot * (2 * HALF) + d[None, :], k1)
        tl.store(key + slot * (2 * HALF) + HALF + d[None, :], k2)
        tl.store(value + slot * (2 * HALF) + wide, v)

        own = q1.to(tl.float32) * k1.to(tl.float32) + q2.to(tl.float32) * k2.to(tl.float32)
        top = tl.sum(own, 1)
        total = tl.full([TILE], 1.0, tl.float32)
        out = tl.zeros([TILE, 2 * HALF], tl.float32) + v.to(tl.float32)[None, :]

        for index in range(first_part, last_part):
            at = part.to(tl.int64) * (NUM_KV_HEADS * GROUP) + q_head
            lse = tl.load(part_lse + at, mask=seen, other=float("-inf")) * LOG2_E
            told = tl.load(part_out + at[:, None] * (2 * HALF) + wide[None, :], mask=seen[:, None], other=0.0)
            part = tl.load(parts + index + 1, mask=index + 1 < last_part, other=0)  # the next one's
            new_top = tl.maximum(top, lse)
            keep = tl.math.exp2(top - new_top)
            weight = tl.math.exp2(lse - new_top)
            total = total * keep + weight
            out = out * keep[:, None] + tl.where(weight[:, None] > 0.0, told * weight[:, None], 0.0)
            top = new_top

        j = tl.arange(0, KEYS)
        for n in range(0, length, KEYS):
            there = n + j < length
            if PAGE % KEYS == 0:
                slots = in_head + tl.load(pages + n // PAGE) * PAGE + n % PAGE + j
            else:
                slots = in_head + tl.load(pages + (n + j) // PAGE, mask=there, other=0) * PAGE + (n + j) % PAGE
            held = key + slots[:, None] * (2 * HALF) + d[None, :]
            scores = tl.dot(q1, tl.load(held, mask=there[:, None], other=0.0).T, input_precision=PRECISION)
            second = tl.load(held + HALF, mask=there[:, None], other=0.0)
            scores = tl.dot(q2, second.T, scores, input_precision=PRECISION)
            scores = tl.where(there[None, :], scores, float("-inf"))
            values = tl.load(value + slots[:, None] * (2 * HALF) + wide[None, :], mask=there[:, None], other=0.0)
            top, total, out = soften(scores, top, total, out, values, PRECISION)

        to = result + (row * (NUM_KV_HEADS * GROUP) + q_head)[:, None] * (2 * HALF) + wide[None, :]
        tl.store(to, (out * (1.0 / total)[:, None]).to(result.dtype.element_ty), mask=seen[:, None])
