"""Drawing a token a row on a CUDA device: one program a row, after `summarize_kernel` has read all logits.

The likeliest logit's strip is known, and so is greedy's token. A draw looks at a row's likeliest few first, then at
more of them, and walks all of it where its number, its top-p or its top-k goes beyond those.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spolia_kernels.sample.draw_triton import drawn, mass_of
from spolia_kernels.sample.keys_triton import INFINITE_KEY, LEAST_KEY, NO_KEY, keys_at, logits_of
from spolia_kernels.sample.likeliest_triton import gathered, nth_largest


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
    highest,
    part_tops,
    part_sums,
    part_masses,
    num_parts,
    chosen_strips,
    few_keys,
    few_ids,
    token_ids,
    logprobs,
    STRIP: tl.constexpr,
    STRIPS: tl.constexpr,
    NUM_STRIPS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    FEW: tl.constexpr,
    CAPACITY: tl.constexpr,
    LIST_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See `spolia_kernels.sample.sample_rows`.

    `highest` and `part_*` are of `summarize_kernel`: `num_parts` parts of STRIPS strips of STRIP logits; NUM_STRIPS and
    NUM_PARTS are powers of two that hold as many. Rows of `chosen_strips` [NUM_STRIPS], `few_keys` and `few_ids`
    [CAPACITY] are memory to work in.
    """
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(num_rows):
        line = logits + row * stride_row
        strip, part = tl.arange(0, NUM_STRIPS), tl.arange(0, NUM_PARTS)
        highs = tl.load(highest + row * (num_parts * STRIPS) + strip, mask=strip < num_parts * STRIPS, other=NO_KEY)
        top_key = tl.max(highs, 0)
        top = logits_of(top_key)
        token = tl.full([], -1, tl.int32)
        logprob = tl.full([], float("nan"), tl.float32)
        if (top_key >= LEAST_KEY) & (top_key < INFINITE_KEY):
            there = part < num_parts
            part_top = tl.load(part_tops + row * num_parts + part, mask=there, other=float("-inf"))
            sums = tl.load(part_sums + row * num_parts + part, mask=there, other=0.0)
            total = tl.sum(sums * tl.exp(part_top - top), 0)
            temperature = tl.load(temperatures + row)
            if temperature > 0.0:
                masses = tl.load(part_masses + row * num_parts + part, mask=there, other=0.0).to(tl.float64)
                mass = tl.sum(masses * tl.exp((part_top.to(tl.float64) - top.to(tl.float64)) / temperature), 0)
                top_p, top_k, number = tl.load(top_ps + row), tl.load(top_ks + row), tl.load(numbers + row)
                top_k = tl.where(top_k < vocab, top_k, 0)
                num_strips = tl.cdiv(vocab, STRIP)
                low = tl.min(tl.where(strip < num_strips, highs, top_key), 0)
                chosen = chosen_strips + row * NUM_STRIPS
                few, few_id = few_keys + row * CAPACITY, few_ids + row * CAPACITY

                size = tl.full([], -1, tl.int32)
                bound = top_key
                num_wanted = tl.full([], FEW, tl.int32)
                while (size < 0) & (num_wanted > 0):
                    least = tl.minimum(tl.maximum(num_wanted, top_k), num_strips)
                    bound = tl.maximum(nth_largest(highs, least, low, top_key), LEAST_KEY)
                    bound = tl.where(vocab <= CAPACITY, LEAST_KEY, bound)
                    count = gathered(
                        line, vocab, highs, bound, chosen, few, few_id, CAPACITY, NUM_STRIPS, STRIP, STRIPS
                    )
                    tl.debug_barrier()
                    if count <= CAPACITY:
                        suffices = bound == LEAST_KEY
                        if top_k > 0:
                            suffices = suffices | (count >= top_k)
                        else:
                            held = mass_of(few, count, top, temperature, True, LIST_BLOCK)
                            suffices = suffices | (held > tl.where(top_p < 1.0, top_p, number) * mass)
                        size = tl.where(suffices, count, size)
                    tl.debug_barrier()
                    num_wanted = tl.where(num_wanted < num_strips // 2, num_strips // 2, 0)

                if size >= 0:
                    # Of a row's upper part the mass is known, of all that counts it is added up.
                    whole = tl.where((top_k > 0) | (bound == LEAST_KEY), -1.0, mass)
                    at = drawn(
                        few, size, bound, top_key, whole, top, temperature, top_p, top_k, number, True, LIST_BLOCK
                    )
                    token = tl.load(few_id + at)
                else:
                    below = top_key * 0 + (LEAST_KEY - 1)
                    whole = mass * 0.0 - 1.0
                    token = drawn(
                        line, vocab, below, top_key, whole, top, temperature, top_p, top_k, number, False, BLOCK
                    )
            else:
                first = tl.min(tl.where(highs == top_key, strip, NUM_STRIPS), 0)
                at = first * STRIP + tl.arange(0, STRIP)
                token = tl.min(tl.where(keys_at(line, at, at < vocab) == top_key, at, vocab), 0)
            logprob = tl.load(line + token).to(tl.float32) - top - tl.log(total)
        tl.store(token_ids + row, token.to(tl.int64))
        tl.store(logprobs + row, logprob)
