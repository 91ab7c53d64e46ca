"""Prompts that come at once are computed in one pass, and answered as if each had come alone."""

from __future__ import annotations

import asyncio

from tiny_cluster import World, ask, assert_same, doc, eventually, held_engine, tokens

from spolia_core.reuse import ReuseMode, TokenSource
from spolia_core.sampling import SamplingParams

GREEDY = SamplingParams(max_tokens=12)
PASSES = "spolia_engine_joint_passes_total"


async def test_prompts_that_come_at_once_share_a_pass(world: World) -> None:
    decode = await world.decode(local_prefill_tokens=100)
    prompts = [[tokens(10 + 3 * i, seed=i)] for i in range(6)]
    with held_engine(decode.thread):
        asking = [asyncio.ensure_future(ask(decode, prompt, GREEDY)) for prompt in prompts]
        await eventually(lambda: decode.thread.queue_length == len(prompts))
    for prompt, answer in zip(prompts, await asyncio.gather(*asking), strict=True):
        assert_same(answer, world.expect(prompt, GREEDY))
    metrics = decode.server.metrics
    assert metrics.value(PASSES) == 1
    assert metrics.value("spolia_engine_slices_total", kind="context") == 6


async def test_links_over_the_same_documents_share_a_pass(world: World) -> None:
    decode = await world.decode(local_prefill_tokens=100)
    documents = [doc(60, seed=i) for i in range(3)]
    await ask(decode, [*documents, tokens(5, seed=8)], GREEDY, ReuseMode.LINKED)
    prompts = [[documents[(i + k) % 3] for k in range(3)] + [tokens(7 + i, seed=20 + i)] for i in range(3)]
    before = decode.server.metrics.value(PASSES)
    with held_engine(decode.thread):
        asking = [asyncio.ensure_future(ask(decode, prompt, GREEDY, ReuseMode.LINKED)) for prompt in prompts]
        await eventually(lambda: decode.thread.queue_length == len(prompts))
    for prompt, answer in zip(prompts, await asyncio.gather(*asking), strict=True):
        assert_same(answer, world.expect(prompt, GREEDY, ReuseMode.LINKED))
        assert answer.sources[TokenSource.DEVICE] > 0
    assert decode.server.metrics.value(PASSES) == before + 1


async def test_a_deterministic_node_computes_each_prompt_alone(world: World) -> None:
    decode = await world.decode(local_prefill_tokens=100, deterministic=True)
    prompts = [[tokens(10 + 3 * i, seed=i)] for i in range(3)]
    with held_engine(decode.thread):
        asking = [asyncio.ensure_future(ask(decode, prompt, GREEDY)) for prompt in prompts]
        await eventually(lambda: decode.thread.queue_length == len(prompts))
    await asyncio.gather(*asking)
    metrics = decode.server.metrics
    assert metrics.value(PASSES) == 0
    assert metrics.value("spolia_engine_slices_total", kind="context") == 3
