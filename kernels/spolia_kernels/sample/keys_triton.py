"""Logits as integers that order as they do: equal ones stay together, and halving a range of them ends.

Imports Triton: load it only where kernels run.
"""

from __future__ import annotations

import triton
import triton.language as tl

ALL_BUT_SIGN: tl.constexpr = tl.constexpr(0x7FFFFFFF)
NO_KEY: tl.constexpr = tl.constexpr(-0x80000000)
"""Below every logit's key."""
LEAST_KEY: tl.constexpr = tl.constexpr(-0x7F800000)
"""Of the smallest logit that has any probability: the key behind that of -inf."""
INFINITE_KEY: tl.constexpr = tl.constexpr(0x7F800000)
"""Of inf; that of a NaN is larger."""


@triton.jit
def keys_of(x):
    """int32 of logits that are no NaN. -0 is 0: one of two equal logits must not come first for its sign."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.float32).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & ALL_BUT_SIGN)


@triton.jit
def logits_of(key):
    """float32: what `keys_of` was given."""
    return (key ^ ((key >> 31) & ALL_BUT_SIGN)).to(tl.float32, bitcast=True)


@triton.jit
def keys_at(line, at, inside):
    """Keys of a row's logits `at` some places; those that are not `inside` come last of all, behind -inf."""
    x = tl.load(line + at, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.where(inside, keys_of(x), NO_KEY)


@triton.jit
def weights_of(key, top, temperature):
    """exp((x - top) / temperature), float64."""
    return tl.exp((logits_of(key).to(tl.float64) - top.to(tl.float64)) / temperature)
