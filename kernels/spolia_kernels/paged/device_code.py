"""Triton functions that the paged kernels share. Imports Triton: load it only where kernels run."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_turned(query, stride_row, rows, heads, positions, cos, sin, scale, seen, HALF: tl.constexpr):
    """Query rows turned to `positions`, times `scale`, as their two halves [tile, HALF] in query's dtype."""
    d = tl.arange(0, HALF)
    at = query + (rows.to(tl.int64) * stride_row + heads * (2 * HALF))[:, None] + d[None, :]
    first = tl.load(at, mask=seen[:, None], other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=seen[:, None], other=0.0).to(tl.float32)
    angle = positions[:, None] * HALF + d[None, :]
    c = tl.load(cos + angle, mask=seen[:, None], other=0.0) * scale
    s = tl.load(sin + angle, mask=seen[:, None], other=0.0) * scale
    dtype = query.dtype.element_ty
    return (first * c - second * s).to(dtype), (second * c + first * s).to(dtype)


@triton.jit
def scan(
    first,
    second,
    top,
    total,
    out,
    key,
    value,
    pages,
    low,
    high,
    start,
    end,
    stride_page,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One pass of online softmax over keys `low` … `high` in steps of KEYS, hiding those outside `start` … `end`.

    `first`, `second`: halves of the query rows, scaled for base 2. `pages` points at the page of key 0; `key` and
    `value` at the head in page 0. Returns the running maximum, sum (both in base 2) and unnormalised output.
    """
    d = tl.arange(0, HALF)
    wide = tl.arange(0, 2 * HALF)
    j = tl.arange(0, KEYS)
    for at in range(low, high, KEYS):
        n = at + j
        if PAGE % KEYS == 0:
            page = tl.load(pages + at // PAGE).to(tl.int64) * stride_page
            where = page + ((at % PAGE + j) * (2 * HALF))
        else:
            held = tl.minimum(n, end - 1)  # no page is named behind the last key's
            page = tl.load(pages + held // PAGE).to(tl.int64) * stride_page
            where = page + (n % PAGE) * (2 * HALF)
        scores = tl.dot(first, tl.trans(tl.load(key + where[:, None] + d[None, :])), input_precision=PRECISION)
        scores = tl.dot(
            second, tl.trans(tl.load(key + where[:, None] + (HALF + d)[None, :])), scores, input_precision=PRECISION
        )
        if MASKED:
            scores = tl.where(((n >= start) & (n < end))[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.math.exp2(scores - new_top[:, None])
        keep = tl.math.exp2(top - new_top)
        total = total * keep + tl.sum(weights, 1)
        out = out * keep[:, None]
        values = tl.load(value + where[:, None] + wide[None, :])
        out = tl.dot(weights.to(values.dtype), values, out, input_precision=PRECISION)
        top = new_top
    return top, total, out
