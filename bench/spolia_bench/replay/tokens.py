"""Token ids of a trace's prompts: a block's tokens follow from its key alone, so equal blocks are equal tokens.

Ids are chained over the prefix already, so nothing but the id has to enter.
"""

from __future__ import annotations

import random

from spolia_bench.replay.trace import BlockKey, TraceRequest


def block_token_ids(key: BlockKey, num_tokens: int, vocab_size: int) -> list[int]:
    """The first `num_tokens` of a block: a shorter one is the beginning of a longer one."""
    rng = random.Random(f"block-{key[0]}-{key[1]}")
    return [rng.randrange(vocab_size) for _ in range(num_tokens)]


def prompt_token_ids(request: TraceRequest, number: int, block_tokens: int, vocab_size: int) -> list[int]:
    """The prompt of request `number`; tokens behind its blocks are drawn from its number."""
    tokens: list[int] = []
    for key in request.blocks:
        size = min(block_tokens, request.num_input_tokens - len(tokens))
        tokens += block_token_ids(key, size, vocab_size)
    return tokens + block_token_ids((-1, number), request.num_input_tokens - len(tokens), vocab_size)
