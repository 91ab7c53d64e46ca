"""What a row's logits come to, a strip at a time: how high each stands, and what the strips of a part weigh.

Many programs a row: this is the one time that all logits of every row are read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spolia_kernels.sample.keys_triton import INFINITE_KEY, NO_KEY, keys_of

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
STEEPEST: tl.constexpr = tl.constexpr(1e30)
"""Bounds 1 / temperature, so that the likeliest logit's 0 / temperature is 0 in float32."""
NAN_KEY: tl.constexpr = tl.constexpr(0x7FFFFFFF)


@triton.jit
def summarize_kernel(
    logits,
    stride_row,
    vocab,
    num_rows,
    temperatures,
    highest,
    part_tops,
    part_sums,
    part_masses,
    STRIP: tl.constexpr,
    STRIPS: tl.constexpr,
):
    """Of part `program_id(0)` of row `program_id(1)`, STRIPS of STRIP logits.

    `highest` [num_rows, num_parts * STRIPS]: the largest key of each strip; NAN_KEY where one is no number. `part_tops`
    [num_rows, num_parts]: the part's largest logit x*; `part_sums`: sum of e^(x - x*); `part_masses`: sum of
    e^((x - x*) / temperature). All float32; 0 where no logit is above -inf.
    """
    part, num_parts = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    if row < tl.load(num_rows):
        strip = part * STRIPS + tl.arange(0, STRIPS)
        at = strip[:, None] * STRIP + tl.arange(0, STRIP)[None, :]
        inside = at < vocab
        x = tl.load(logits + row * stride_row + at, mask=inside, other=float("-inf")).to(tl.float32)
        key = tl.where(x == x, tl.where(inside, keys_of(x), NO_KEY), NAN_KEY)
        high = tl.max(key, 1)
        tl.store(highest + row * (num_parts * STRIPS) + strip, high)

        x = tl.where(key < INFINITE_KEY, x, float("-inf"))
        top = tl.max(tl.max(x, 1), 0)
        below = tl.where(x > float("-inf"), x - top, float("-inf"))
        temperature = tl.load(temperatures + row)
        steep = tl.minimum(1.0 / tl.maximum(temperature, 1e-300), STEEPEST).to(tl.float32)
        to = row * num_parts + part
        tl.store(part_tops + to, top)
        tl.store(part_sums + to, tl.sum(tl.sum(tl.math.exp2(below * LOG2_E), 1), 0))
        tl.store(part_masses + to, tl.sum(tl.sum(tl.math.exp2(below * steep * LOG2_E), 1), 0))
