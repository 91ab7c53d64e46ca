"""Attention over spans on a CUDA device: persistent programs that walk a list of items.

The query tile is gathered by row, rotated in registers by each row's own distance from the span, and scaled for base 2;
the keys come by the device's tensor copies. How many items there are is read on the
device, so that one CUDA graph serves every batch that fits its buffers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spolia_kernels.paged.shared_triton import soften, turned_halves

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def attend_spans_kernel(
    query,
    key,
    value,
    num_slots,
    items,
    num_items,
    rows,
    offsets,
    positions,
    cos,
    sin,
    part_out,
    part_lse,
    sm_scale,
    stride_row,
    NUM_Q_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    for index in range(tl.program_id(0), tl.load(num_items), tl.num_programs(0)):
        item = items + index * 8
        head = tl.load(item)
        first_reading = tl.load(item + 1)
        num_readings = tl.load(item + 2)
        low = head * num_slots + tl.load(item + 3)
        high = head * num_slots + tl.load(item + 4)
        part = tl.load(item + 5)

        m = tl.arange(0, TILE)
        d = tl.arange(0, HALF)
        reading = m // GROUP
        q_head = head * GROUP + m % GROUP
        seen = reading < num_readings
        row = tl.load(rows + first_reading + reading, mask=seen, other=0)
        offset = tl.load(offsets + first_reading + reading, mask=seen, other=0)
        distance = tl.load(positions + row, mask=seen, other=0) - offset
        at = query + (row.to(tl.int64) * stride_row + q_head * (2 * HALF))[:, None] + d[None, :]
        angle = distance[:, None] * HALF + d[None, :]
        first, second = turned_halves(at, angle, cos, sin, sm_scale * LOG2_E, seen[:, None], HALF)
        turned = tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), (TILE, 2 * HALF))
        turned = turned.to(query.dtype.element_ty)

        top = tl.full([TILE], float("-inf"), tl.float32)
        total = tl.zeros([TILE], tl.float32)
        out = tl.zeros([TILE, 2 * HALF], tl.float32)
        whole = low + (high - low) // KEYS * KEYS
        for n in range(low, whole, KEYS):
            scores = tl.dot(turned, key.load([n, 0]).T, input_precision=PRECISION)
            top, total, out = soften(scores, top, total, out, value.load([n, 0]), PRECISION)
        if whole < high:
            scores = tl.dot(turned, key.load([whole, 0]).T, input_precision=PRECISION)
            inside = whole + tl.arange(0, KEYS) < high  # at least one key is: no row is empty
            scores = tl.where(inside[None, :], scores, float("-inf"))
            # Past the end lie others' values, and a weight of zero does not hide what is no number.
            values = tl.where(inside[:, None], value.load([whole, 0]), 0.0)
            top, total, out = soften(scores, top, total, out, values, PRECISION)

        to = (part + reading).to(tl.int64) * NUM_Q_HEADS + q_head
        tl.store(part_lse + to, (top + tl.math.log2(total)) * LN_2, mask=seen)
        wide = tl.arange(0, 2 * HALF)
        tl.store(part_out + to[:, None] * (2 * HALF) + wide[None, :], out * (1.0 / total)[:, None], mask=seen[:, None])
