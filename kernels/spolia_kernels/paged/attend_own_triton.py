"""`attend_tails` where every query head has a KV head of its own: one vector of a query per program.

A matrix product would fill one row of its sixteen; here scores are sums of products, and a program is one warp or two,
of which many fit a multiprocessor and hide each other's waits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spolia_kernels.paged.shared_triton import turned_halves

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_own_kernel(
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
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
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
        d = tl.arange(0, HALF)[None, :]
        wide = tl.arange(0, 2 * HALF)
        pages = tail_pages + row * max_pages
        in_head = head.to(tl.int64) * num_slots
        angle = position * HALF + d
        in_row = row * stride_row + head * (2 * HALF)

        q1, q2 = turned_halves(query + in_row + d, angle, cos, sin, sm_scale * LOG2_E, angle >= 0, HALF)
        k1, k2 = turned_halves(new_key + in_row + d, angle, cos, sin, 1.0, angle >= 0, HALF)
        k1, k2 = k1.to(key.dtype.element_ty), k2.to(key.dtype.element_ty)
        v = tl.load(new_value + in_row + wide).to(value.dtype.element_ty)
        slot = in_head + tl.load(pages + length // PAGE) * PAGE + length % PAGE
        tl.store(key + slot * (2 * HALF) + d, k1)
        tl.store(key + slot * (2 * HALF) + HALF + d, k2)
        tl.store(value + slot * (2 * HALF) + wide, v)

        top = tl.sum(q1 * k1.to(tl.float32) + q2 * k2.to(tl.float32))
        total = 1.0
        out = v.to(tl.float32)

        for index in range(first_part, last_part):
            at = part.to(tl.int64) * NUM_HEADS + head
            lse = tl.load(part_lse + at) * LOG2_E
            told = tl.load(part_out + at * (2 * HALF) + wide)
            part = tl.load(parts + index + 1, mask=index + 1 < last_part, other=0)  # the next one's
            new_top = tl.maximum(top, lse)
            keep = tl.math.exp2(top - new_top)
            weight = tl.math.exp2(lse - new_top)
            total = total * keep + weight
            out = out * keep + tl.where(weight > 0.0, told * weight, 0.0)
            top = new_top

        j = tl.arange(0, KEYS)
        for n in range(0, length, KEYS):
            there = n + j < length
            if PAGE % KEYS == 0:
                slots = in_head + tl.load(pages + n // PAGE) * PAGE + n % PAGE + j
            else:
                slots = in_head + tl.load(pages + (n + j) // PAGE, mask=there, other=0) * PAGE + (n + j) % PAGE
            held = key + slots[:, None] * (2 * HALF) + d
            first = tl.load(held, mask=there[:, None], other=0.0).to(tl.float32)
            second = tl.load(held + HALF, mask=there[:, None], other=0.0).to(tl.float32)
            values = tl.load(value + slots[:, None] * (2 * HALF) + wide[None, :], mask=there[:, None], other=0.0)
            scores = tl.where(there, tl.sum(first * q1 + second * q2, 1), float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 0))
            weights = tl.math.exp2(scores - new_top)
            keep = tl.math.exp2(top - new_top)
            total = total * keep + tl.sum(weights, 0)
            out = out * keep + tl.sum(weights[:, None] * values.to(tl.float32), 0)
            top = new_top

        answer = (out * (1.0 / total)).to(result.dtype.element_ty)
        tl.store(result + (row * NUM_HEADS + head) * (2 * HALF) + wide, answer)
