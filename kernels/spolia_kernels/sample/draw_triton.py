"""Drawing from keys without sorting them, be they a row's likeliest few or all of it.

Who is the k-th largest, where a share of the probability is reached, and where a random number falls, are one
question: at which key do the keys above it first hold so much. It is answered by halving: what lies between a low and a
high bound is added up above the middle, and either half is left. Keys that are equal stay together, and among them
the smaller id comes first.

Sums are float64: they must not depend on the order in which a device adds, where a draw falls near a bound.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spolia_kernels.sample.keys_triton import NO_KEY, keys_at, weights_of


@triton.jit
def _block(source, first, size, LISTED: tl.constexpr, BLOCK: tl.constexpr):
    """Keys `first` … of a list of keys, or of a line of logits; NO_KEY behind its end."""
    at = first + tl.arange(0, BLOCK)
    return tl.load(source + at, mask=at < size, other=NO_KEY) if LISTED else keys_at(source, at, at < size)


@triton.jit
def mass_of(source, size, top, temperature, LISTED: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of all weights."""
    found = tl.zeros([BLOCK], tl.float64)
    for n in range(0, size, BLOCK):
        key = _block(source, n, size, LISTED, BLOCK)
        found += tl.where(key > NO_KEY, weights_of(key, top, temperature), 0.0)
    return tl.sum(found, 0)


@triton.jit
def _descended(
    source,
    size,
    low,
    high,
    target,
    top,
    temperature,
    COUNTS: tl.constexpr,
    PASSES: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest key such that what is at or above it reaches `target`, and what is above it.

    `high` occurs; `low` is the answer where all of it does not suffice. COUNTS: keys are counted, else their weights
    are added. PASSES: `target` must be passed, not reached.
    """
    above = target * 0.0
    while low < high:
        middle = ((low.to(tl.int64) + high.to(tl.int64)) >> 1).to(tl.int32)
        found = tl.zeros([BLOCK], tl.float64)
        least = tl.zeros([BLOCK], tl.int32) + high
        most = tl.zeros([BLOCK], tl.int32) + low
        for n in range(0, size, BLOCK):
            key = _block(source, n, size, LISTED, BLOCK)
            upper = (key > middle) & (key <= high)
            least = tl.minimum(least, tl.where(upper, key, high))
            most = tl.maximum(most, tl.where(key <= middle, key, low))
            if COUNTS:
                found += tl.where(upper, 1.0, 0.0)
            elif tl.max(upper.to(tl.int32), 0) > 0:  # exponentials only where one counts
                found += tl.where(upper, weights_of(key, top, temperature), 0.0)
        reached = above + tl.sum(found, 0)
        if (target < reached) if PASSES else (target <= reached):
            low = tl.min(least, 0)
        else:
            high = tl.max(most, 0)
            above = reached
    return high, above


@triton.jit
def numbered(source, size, key, number, LISTED: tl.constexpr, BLOCK: tl.constexpr):
    """The index of number `number` of those with `key`, in order; of the last of them where there are fewer."""
    before = number * 0
    found = before - 1
    last = before - 1
    for n in range(0, size, BLOCK):
        at = n + tl.arange(0, BLOCK)
        equal = (_block(source, n, size, LISTED, BLOCK) == key).to(tl.int32)
        place = before + tl.cumsum(equal, 0) - 1
        found = tl.maximum(found, tl.max(tl.where((equal > 0) & (place == number), at, -1), 0))
        last = tl.maximum(last, tl.max(tl.where(equal > 0, at, -1), 0))
        before += tl.sum(equal, 0)
    return tl.where(found < 0, last, found)


@triton.jit
def drawn(
    source,
    size,
    lowest,
    top_key,
    whole,
    top,
    temperature,
    top_p,
    top_k,
    number,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The index in `source` of what `number`, 0 … 1, falls on.

    `lowest` and `top_key` bound the keys that count, `top` is the largest logit. `whole` is the mass of the row where
    `source` is its upper part, and negative where `source` holds all that any filter looks at; there `top_k` is not 0
    only where it filters.
    """
    # Those kept: all above `bound`, and the first `num_equal` of those at it.
    bound = lowest
    num_equal = size
    if top_k > 0:
        target = top_k.to(tl.float64)
        bound, num_above = _descended(
            source, size, lowest, top_key, target, top, temperature, True, False, LISTED, BLOCK
        )
        num_equal = top_k - num_above.to(tl.int32)
    masses = tl.zeros([BLOCK], tl.float64)
    equals = tl.zeros([BLOCK], tl.int32)
    least = tl.zeros([BLOCK], tl.int32) + top_key
    for n in range(0, size, BLOCK):
        key = _block(source, n, size, LISTED, BLOCK)
        weight = weights_of(key, top, temperature)
        masses += tl.where(key > bound, weight, 0.0)
        equals += (key == bound).to(tl.int32)
        least = tl.minimum(least, tl.where((key >= bound) & (weight > 0.0), key, top_key))
    num_equal = tl.minimum(num_equal, tl.sum(equals, 0))
    mass = tl.sum(masses, 0) + num_equal.to(tl.float64) * weights_of(bound, top, temperature)
    if whole >= 0.0:
        mass = whole
    lowest = tl.min(least, 0)
    if top_p < 1.0:
        wanted = top_p * mass
        at, above = _descended(source, size, lowest, top_key, wanted, top, temperature, False, False, LISTED, BLOCK)
        each = weights_of(at, top, temperature)
        # One that begins below `wanted` is kept.
        count = tl.maximum(tl.ceil((wanted - above) / each), 1.0).to(tl.int32)
        num_equal = tl.where(at == bound, tl.minimum(count, num_equal), count)
        mass = tl.minimum(above + num_equal.to(tl.float64) * each, mass)
        bound = at
        lowest = at
    target = number * mass
    at, above = _descended(source, size, lowest, top_key, target, top, temperature, False, True, LISTED, BLOCK)
    place = tl.floor((target - above) / weights_of(at, top, temperature)).to(tl.int32)
    place = tl.where(at == bound, tl.minimum(place, num_equal - 1), place)
    return numbered(source, size, at, tl.maximum(place, 0), LISTED, BLOCK)
