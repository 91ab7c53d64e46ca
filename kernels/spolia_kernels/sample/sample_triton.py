"""Drawing a token a row on a CUDA device, without sorting: one program a row walks its logits a few times.

Whoever is the k-th largest, where a share of the probability is reached, and where a random number falls, are one
question: at which value do the values above it first hold so much. It is answered by halving: the numbers between a low
and a high bound, both of them values that occur, are added up above the middle, and either half is left. Values are
compared as integers that order as they do, so equal logits stay together, and among them the smaller id comes first.

Sums are float64: they must not depend on the order in which a device adds, where a draw falls near a bound.
"""

from __future__ import annotations

import triton
import triton.language as tl

ALL_BUT_SIGN: tl.constexpr = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _loaded(line, n, vocab, BLOCK: tl.constexpr):
    """Logits n … of a row, [BLOCK], -inf behind its end; no -0."""
    at = n + tl.arange(0, BLOCK)
    x = tl.load(line + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    return tl.where(x == 0.0, 0.0, x)


@triton.jit
def _key_of(x):
    """An int32 that orders as the float32 does."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & ALL_BUT_SIGN)


@triton.jit
def _weight_of(x, top, temperature):
    """exp((x - top) / temperature), float64."""
    return tl.exp((x.to(tl.float64) - top.to(tl.float64)) / temperature)


@triton.jit
def _weight_of_key(key, top, temperature):
    bits = key ^ ((key >> 31) & ALL_BUT_SIGN)
    return _weight_of(bits.to(tl.float32, bitcast=True), top, temperature)


@triton.jit
def _descended(
    line, vocab, low, high, target, top, temperature, COUNTS: tl.constexpr, PASSES: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest key such that what is at or above it reaches `target`, and what is above it.

    `low` and `high` are keys that occur. COUNTS: numbers are counted, else their weights are added. PASSES: `target`
    must be passed, not reached. Where all of it does not suffice, by rounding, the answer is `low`.
    """
    above = target * 0.0
    while low < high:
        middle = ((low.to(tl.int64) + high.to(tl.int64)) >> 1).to(tl.int32)
        found = tl.zeros([BLOCK], tl.float64)
        least = tl.zeros([BLOCK], tl.int32) + high
        most = tl.zeros([BLOCK], tl.int32) + low
        for n in range(0, vocab, BLOCK):
            x = _loaded(line, n, vocab, BLOCK)
            key = _key_of(x)
            upper = (key > middle) & (key <= high)
            least = tl.minimum(least, tl.where(upper, key, high))
            most = tl.maximum(most, tl.where(key <= middle, key, low))
            if COUNTS:
                found += tl.where(upper, 1.0, 0.0)
            elif tl.max(upper.to(tl.int32), 0) > 0:  # exponentials only where one counts
                found += tl.where(upper, _weight_of(x, top, temperature), 0.0)
        reached = above + tl.sum(found, 0)
        if (target < reached) if PASSES else (target <= reached):
            low = tl.min(least, 0)
        else:
            high = tl.max(most, 0)
            above = reached
    return high, above


@triton.jit
def _numbered(line, vocab, key, number, BLOCK: tl.constexpr):
    """The id of number `number` of those with `key`, in order; the last of them where there are fewer."""
    before = number * 0
    token = before - 1
    last = before - 1
    for n in range(0, vocab, BLOCK):
        at = n + tl.arange(0, BLOCK)
        equal = ((_key_of(_loaded(line, n, vocab, BLOCK)) == key) & (at < vocab)).to(tl.int32)
        place = before + tl.cumsum(equal, 0) - 1
        token = tl.maximum(token, tl.max(tl.where((equal > 0) & (place == number), at, -1), 0))
        last = tl.maximum(last, tl.max(tl.where(equal > 0, at, -1), 0))
        before += tl.sum(equal, 0)
    return tl.where(token < 0, last, token)


@triton.jit
def _drawn(line, vocab, lowest, top, temperature, top_p, top_k, number, BLOCK: tl.constexpr):
    """The token that `number`, 0 … 1, falls on."""
    highest = _key_of(top)
    # Those kept: all above `bound`, and the first `num_equal` of those at it.
    bound = lowest
    num_equal = lowest * 0 + vocab
    if (top_k > 0) & (top_k < vocab):
        bound, num_above = _descended(
            line, vocab, lowest, highest, top_k.to(tl.float64), top, temperature, True, False, BLOCK
        )
        num_equal = top_k - num_above.to(tl.int32)
    masses = tl.zeros([BLOCK], tl.float64)
    equals = tl.zeros([BLOCK], tl.int32)
    least = tl.zeros([BLOCK], tl.int32) + highest
    for n in range(0, vocab, BLOCK):
        x = _loaded(line, n, vocab, BLOCK)
        key, weight = _key_of(x), _weight_of(x, top, temperature)
        inside = n + tl.arange(0, BLOCK) < vocab
        masses += tl.where(key > bound, weight, 0.0)
        equals += ((key == bound) & inside).to(tl.int32)
        least = tl.minimum(least, tl.where((key >= bound) & (weight > 0.0), key, highest))
    num_equal = tl.minimum(num_equal, tl.sum(equals, 0))
    mass = tl.sum(masses, 0) + num_equal.to(tl.float64) * _weight_of_key(bound, top, temperature)
    lowest = tl.min(least, 0)
    if top_p < 1.0:
        wanted = top_p * mass
        at, above = _descended(line, vocab, lowest, highest, wanted, top, temperature, False, False, BLOCK)
        each = _weight_of_key(at, top, temperature)
        # One that begins below `wanted` is kept.
        count = tl.maximum(tl.ceil((wanted - above) / each), 1.0).to(tl.int32)
        num_equal = tl.where(at == bound, tl.minimum(count, num_equal), count)
        mass = tl.minimum(above + num_equal.to(tl.float64) * each, mass)
        bound = at
        lowest = at
    target = number * mass
    at, above = _descended(line, vocab, lowest, highest, target, top, temperature, False, True, BLOCK)
    place = tl.floor((target - above) / _weight_of_key(at, top, temperature)).to(tl.int32)
    place = tl.where(at == bound, tl.minimum(place, num_equal - 1), place)
    return _numbered(line, vocab, at, tl.maximum(place, 0), BLOCK)


@triton.jit
def sample_kernel(
    logits,
    stride_row,
    vocab,
    num_rows,
    temperatures,
    top_ps,
    top_ks,
    numbers,
    token_ids,
    logprobs,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(num_rows):
        line = logits + row * stride_row
        tops = tl.full([BLOCK], float("-inf"), tl.float32)
        lows = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
        broken = tl.zeros([BLOCK], tl.int32)
        for n in range(0, vocab, BLOCK):
            x = _loaded(line, n, vocab, BLOCK)
            broken = broken | (x != x).to(tl.int32)
            tops = tl.maximum(tops, x)
            lows = tl.minimum(lows, tl.where(n + tl.arange(0, BLOCK) < vocab, _key_of(x), 0x7FFFFFFF))
        top = tl.max(tops, 0)
        token = tl.full([], -1, tl.int32)
        logprob = tl.full([], float("nan"), tl.float32)
        if (tl.max(broken, 0) == 0) & (top > float("-inf")):
            sums = tl.zeros([BLOCK], tl.float32)
            for n in range(0, vocab, BLOCK):
                sums += tl.exp(_loaded(line, n, vocab, BLOCK) - top)
            temperature = tl.load(temperatures + row)
            if temperature > 0.0:
                top_p, top_k, number = tl.load(top_ps + row), tl.load(top_ks + row), tl.load(numbers + row)
                token = _drawn(line, vocab, tl.min(lows, 0), top, temperature, top_p, top_k, number, BLOCK)
            else:
                token = _numbered(line, vocab, _key_of(top), tl.full([], 0, tl.int32), BLOCK)
            logprob = tl.load(line + token).to(tl.float32) - top - tl.log(tl.sum(sums, 0))
        tl.store(token_ids + row, token.to(tl.int64))
        tl.store(logprobs + row, logprob)
