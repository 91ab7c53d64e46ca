"""Prompts that come at once are computed in one pass, and answered as if each had come alone."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from tiny_answers import ask, assert_same
from tiny_cluster import World, doc, eventually, held_engine, record_calls, tokens

from spolia_core.errors import InternalError
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


async def test_an_answer_goes_on_while_a_prompt_is_read_in_the_same_passes(world: World) -> None:
    decode = await world.decode(local_prefill_tokens=4096, slice_tokens=32)
    long, short = [tokens(300, seed=1)], [tokens(9, seed=2)]
    sampling = SamplingParams(max_tokens=40)
    with held_engine(decode.thread):
        asking = [asyncio.ensure_future(ask(decode, prompt, sampling)) for prompt in (short, long)]
        await eventually(lambda: decode.thread.queue_length == 2)
    for prompt, answer in zip((short, long), await asyncio.gather(*asking), strict=True):
        assert_same(answer, world.expect(prompt, sampling))
    metrics = decode.server.metrics
    num_beside = metrics.value("spolia_steps_beside_prefill_total")
    assert num_beside >= 5, "the short prompt was answered while the slices of the long one ran"
    assert metrics.value(PASSES) >= num_beside
    await world.nothing_held()


async def test_a_pass_that_breaks_ends_the_prompts_in_it_and_no_answer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = await world.decode(local_prefill_tokens=4096, slice_tokens=32)
    original, num_calls = decode.engine.decoding.step_beside, 0

    def breaks_once(*args: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise RuntimeError("broken")
        return original(*args)

    monkeypatch.setattr(decode.engine.decoding, "step_beside", breaks_once)
    long, short = [tokens(300, seed=1)], [tokens(9, seed=2)]
    sampling = SamplingParams(max_tokens=40)
    with held_engine(decode.thread):
        asking = [asyncio.ensure_future(ask(decode, prompt, sampling)) for prompt in (short, long)]
        await eventually(lambda: decode.thread.queue_length == 2)
    answer, error = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(error, InternalError)
    assert not isinstance(answer, BaseException)
    assert_same(answer, world.expect(short, sampling))
    await world.nothing_held()


async def test_a_prompt_has_its_first_token_before_the_next_one_is_computed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spolia_decode.node.HAND_OVER_S", 10.0)
    decode = await world.decode(local_prefill_tokens=4096, slice_tokens=32)
    join = decode.batch.join

    def takes_its_time(*args: Any) -> Any:
        time.sleep(0.03)  # as a loop that has much to do; the engine's thread could go on meanwhile
        return join(*args)

    monkeypatch.setattr(decode.batch, "join", takes_its_time)
    events: list[str] = []
    record_calls(monkeypatch, decode.engine.adapter, "forward_steps", events, "pass")
    record_calls(monkeypatch, decode.engine.decoding, "logits_after", events, "first")
    with held_engine(decode.thread):
        prompts = [[tokens(30, seed=i)] for i in range(4)]
        asking = [asyncio.ensure_future(ask(decode, prompt, SamplingParams(max_tokens=1))) for prompt in prompts]
        await eventually(lambda: decode.thread.queue_length == 4)
    await asyncio.gather(*asking)
    assert events == ["pass", "first"] * 4
