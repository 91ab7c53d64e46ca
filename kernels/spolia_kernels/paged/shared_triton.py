"""Triton functions that the paged kernels share. Imports Triton: load it only where kernels run."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turned_halves(at, angle, cos, sin, scale, seen, HALF: tl.constexpr):
    """What `at` points to, vectors of 2 · HALF, turned by `angle` (an index of `cos` and `sin`) and times `scale`.

    `at` and `angle` [n, HALF] and `seen` [n, 1]; returns both halves, float32.
    """
    first = tl.load(at, mask=seen, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=seen, other=0.0).to(tl.float32)
    c = tl.load(cos + angle, mask=seen, other=0.0) * scale
    s = tl.load(sin + angle, mask=seen, other=0.0) * scale
    return first * c - second * s, second * c + first * s


@triton.jit
def soften(scores, top, total, out, values, PRECISION: tl.constexpr):
    """One step of online softmax in base 2: takes in `scores` [tile, keys] and their `values` [keys, head_dim]."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.math.exp2(scores - new_top[:, None])
    keep = tl.math.exp2(top - new_top)
    total = total * keep + tl.sum(weights, 1)
    out = tl.dot(weights.to(values.dtype), values, out * keep[:, None], input_precision=PRECISION)
    return new_top, total, out
