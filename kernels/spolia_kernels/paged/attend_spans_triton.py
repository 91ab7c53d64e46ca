"""Attention over shared spans on a CUDA device: persistent programs that walk a list of items.

The query tile is gathered by row, rotated in registers by each row's own distance from the span, and scaled for base 2;
the keys come page by page. How many items there are is read on the device, so that one CUDA graph serves every batch
that fits its buffers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spolia_kernels.paged.device_code import load_turned, scan

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def attend_spans_kernel(
    query,
    key,
    value,
    items,
    num_items,
    rows,
    offsets,
    pages,
    positions,
    cos,
    sin,
    part_out,
    part_lse,
    sm_scale,
    stride_row,
    stride_page,
    NUM_Q_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    count = tl.load(num_items)
    for index in range(tl.program_id(0), count, tl.num_programs(0)):
        item = items + index * 8
        head = tl.load(item)
        first_reading = tl.load(item + 1)
        num_readings = tl.load(item + 2)
        first_page = tl.load(item + 3)
        start = tl.load(item + 4)
        end = tl.load(item + 5)
        part = tl.load(item + 6)

        m = tl.arange(0, TILE)
        reading = m // GROUP
        q_head = head * GROUP + m % GROUP
        seen = reading < num_readings
        row = tl.load(rows + first_reading + reading, mask=seen, other=0)
        offset = tl.load(offsets + first_reading + reading, mask=seen, other=0)
        position = tl.load(positions + row, mask=seen, other=0) - offset
        q1, q2 = load_turned(query, stride_row, row, q_head, position, cos, sin, sm_scale * LOG2_E, seen, HALF)

        top = tl.full([TILE], float("-inf"), tl.float32)
        total = tl.zeros([TILE], tl.float32)
        out = tl.zeros([TILE, 2 * HALF], tl.float32)
        in_head = head.to(tl.int64) * (PAGE * 2 * HALF)
        # Whole steps between the first and the last need no mask. The first sees at least one key: no row is empty.
        low = start // KEYS * KEYS
        inner = tl.minimum(low + KEYS, end)
        if start % KEYS == 0:
            inner = low
        whole = tl.maximum(inner, end // KEYS * KEYS)
        top, total, out = scan(
            q1, q2, top, total, out, key + in_head, value + in_head, pages + first_page, low, inner, start, end,
            stride_page, HALF, PAGE, KEYS, True, PRECISION,
        )  # fmt: skip
        top, total, out = scan(
            q1, q2, top, total, out, key + in_head, value + in_head, pages + first_page, inner, whole, start, end,
            stride_page, HALF, PAGE, KEYS, False, PRECISION,
        )  # fmt: skip
        top, total, out = scan(
            q1, q2, top, total, out, key + in_head, value + in_head, pages + first_page, whole, end, start, end,
            stride_page, HALF, PAGE, KEYS, True, PRECISION,
        )  # fmt: skip

        at = (part + reading).to(tl.int64) * NUM_Q_HEADS + q_head
        tl.store(part_lse + at, (top + tl.math.log2(total)) * LN_2, mask=seen)
        d = tl.arange(0, 2 * HALF)
        tl.store(part_out + at[:, None] * (2 * HALF) + d[None, :], out / total[:, None], mask=seen[:, None])
