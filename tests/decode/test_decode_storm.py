"""A storm on one decode node with memory for a few: whatever happens to each request, it ends, and nothing is held."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from tiny_answers import calling, generate_request
from tiny_cluster import World, doc, eventually, tokens

from spolia_core.errors import Busy, DeadlineExceeded
from spolia_core.reuse import ReuseMode
from spolia_core.sampling import SamplingParams
from spolia_decode.node import DecodeNode

NUM_REQUESTS = 120
NUM_BLOCKS = 56
"""A tenth of what all together would take."""


async def one(decode: DecodeNode, number: int) -> str:
    """How it ended."""
    draw = random.Random(number)
    await asyncio.sleep(draw.random() * 2)
    mode = draw.choice(list(ReuseMode))
    parts = [tokens(3), doc(60, draw.randrange(3)), tokens(draw.randint(5, 40), number)]
    num_tokens = draw.randint(1, 60)
    n = draw.choice([1, 1, 1, 4])
    params = SamplingParams(
        max_tokens=num_tokens, ignore_eos=True, temperature=draw.choice([0.0, 1.0]), seed=number, num_samples=n
    )
    reads = draw.randint(0, n * num_tokens) if draw.random() < 0.3 else None  # and then goes away
    timeout = draw.uniform(0.02, 1.0) if draw.random() < 0.2 else 120.0
    received = 0
    try:
        async with calling(decode, generate_request(decode, parts, params, mode), timeout) as call:
            async for response in call:
                received += len(response.delta.token_ids)
                if reads is not None and received >= reads:
                    return "cancelled"
    except (Busy, DeadlineExceeded) as error:
        return type(error).__name__
    assert received == n * num_tokens
    return "answered"


@pytest.mark.slow
async def test_a_storm_leaves_nothing_behind(world: World) -> None:
    await world.store()
    await world.prefill()
    decode = await world.decode(num_blocks=NUM_BLOCKS, max_waiting=80)
    async with asyncio.timeout(150):
        ended = Counter(await asyncio.gather(*(one(decode, number) for number in range(NUM_REQUESTS))))
    assert sum(ended.values()) == NUM_REQUESTS
    assert ended["answered"] > NUM_REQUESTS // 3, ended
    await eventually(lambda: decode.admission.is_idle, "somebody is still here")
    await world.nothing_held()
    decode.engine.pool.check_invariants()
    assert decode.engine.pool._slabs.num_slabs == 0, "a slot is taken"
