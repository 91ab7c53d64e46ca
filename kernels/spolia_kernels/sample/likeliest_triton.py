"""The likeliest few of a row, found by reading the strips that hold them: each strip's largest is known already.

If the n-th largest of the strips' largest is b, then at least n logits are at or above b, and all that are lie in
strips whose largest is. A trained model's n likeliest hold nearly every draw.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spolia_kernels.sample.keys_triton import keys_at


@triton.jit
def nth_largest(keys, n, low, high):
    """The n-th largest of `keys` [num_keys], int32, of which at least n are at or above `low`, none above `high`."""
    low, high = low.to(tl.int64), high.to(tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        if tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), 0) >= n:
            low = middle
        else:
            high = middle - 1
    return low.to(tl.int32)


@triton.jit
def gathered(
    line,
    vocab,
    highest,
    bound,
    strips,
    few_keys,
    few_ids,
    CAPACITY: tl.constexpr,
    NUM_STRIPS: tl.constexpr,
    STRIP: tl.constexpr,
    STRIPS: tl.constexpr,
):
    """Writes keys at or above `bound` and their ids, in order of ids, and returns how many there are.

    `highest` [NUM_STRIPS]: the largest key of each strip. `strips` is room for as many, `few_keys` and `few_ids` for
    CAPACITY: what comes behind them is counted, not written. Whoever reads them needs a barrier first.
    """
    chosen = highest >= bound
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(strips + place, tl.arange(0, NUM_STRIPS), mask=chosen)
    num_chosen = tl.sum(chosen.to(tl.int32), 0)
    tl.debug_barrier()
    count = num_chosen * 0
    for first in range(0, num_chosen, STRIPS):
        which = first + tl.arange(0, STRIPS)
        there = which < num_chosen
        strip = tl.load(strips + which, mask=there, other=0)
        at = strip[:, None] * STRIP + tl.arange(0, STRIP)[None, :]
        key = tl.reshape(keys_at(line, at, there[:, None] & (at < vocab)), (STRIPS * STRIP,))
        kept = key >= bound
        to = count + tl.cumsum(kept.to(tl.int32), 0) - 1
        fits = kept & (to < CAPACITY)
        tl.store(few_keys + to, key, mask=fits)
        tl.store(few_ids + to, tl.reshape(at, (STRIPS * STRIP,)), mask=fits)
        count += tl.sum(kept.to(tl.int32), 0)
    return count
