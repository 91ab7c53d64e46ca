"""Memory and places are few: who waits, who is told to come back, and who gives way. Nothing is held afterwards."""

from __future__ import annotations

import asyncio

import pytest
from decode_requests import GREEDY, LINKED, MODES, read_all
from tiny_answers import ask, calling, generate_request
from tiny_cluster import Parts, World, doc, eventually, held_engine, ids_of, is_idle, prompt_of, tokens

from spolia_core.errors import Busy, DeadlineExceeded, InvalidRequest
from spolia_core.reuse import ReuseMode
from spolia_core.sampling import SamplingParams
from spolia_engine.adapter import ModelAdapter
from spolia_engine.device_decoding import DeviceSettings
from spolia_engine.engine import Engine
from spolia_engine.text import load_decode


async def test_a_request_waits_for_room_within_its_deadline(world: World) -> None:
    decode = await world.decode(num_blocks=12, max_waiting=1)
    pool, holding_room = decode.engine.pool, SamplingParams(max_tokens=96)
    with held_engine(decode.thread) as release:
        async with calling(decode, generate_request(decode, [tokens(16)], holding_room)) as call:
            await eventually(lambda: decode.admission.num_running == 1)
            held = pool.allocate(7 * pool.block_size)
            with pytest.raises(DeadlineExceeded):
                async with calling(decode, generate_request(decode, [tokens(90)], GREEDY), 0.3) as late:
                    await read_all(late)
            async with calling(decode, generate_request(decode, [tokens(90)], SamplingParams(max_tokens=1))) as waits:
                await eventually(lambda: decode.admission.num_waiting == 1)
                with pytest.raises(Busy) as caught:
                    await ask(decode, [tokens(90)], SamplingParams(max_tokens=16))
                assert caught.value.retry_after_ms > 0
                pool.release(held)
                release()
                await read_all(waits)
            await read_all(call)
    await world.nothing_held()


async def test_the_preempted_go_on_where_they_stood(world: World) -> None:
    """Memory for two answers of three: all are given whole, and as they are where there is room."""
    prompts = [tokens(40, seed) for seed in range(3)]
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    roomy = await world.decode(num_blocks=400)
    expected = [await ask(roomy, [prompt], params) for prompt in prompts]
    decode = await world.decode(num_blocks=22)
    found = await asyncio.gather(*(ask(decode, [prompt], params) for prompt in prompts))
    assert decode.batch.num_preempted > 0
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    assert [answer.text for answer in found] == [answer.text for answer in expected]
    assert [sum(answer.sources.values()) for answer in found] == [40, 40, 40]
    await world.nothing_held()


@MODES
async def test_busy_after_a_prefix_was_found_gives_it_back(world: World, parts: Parts, mode: ReuseMode) -> None:
    await world.store()
    await world.prefill()
    decode = await world.decode(num_blocks=100)
    await ask(decode, parts, GREEDY, mode)
    pool = decode.engine.pool
    await eventually(lambda: is_idle(pool))
    prompt = prompt_of(parts, ids_of(decode.engine))
    chunks = [part.chunk_id for part in prompt.parts if part.chunk_id] or list(
        ids_of(decode.engine).prefix_chain(prompt.token_ids)
    )
    reused = [decode.engine.resident.acquire(chunk_id) for chunk_id in chunks]
    assert all(run is not None for run in reused)
    rest = pool.allocate(pool.available_blocks * pool.block_size)
    with pytest.raises(Busy):
        await ask(decode, parts, GREEDY, mode)
    for extent in (rest, *(run.extent for run in reused if run is not None)):
        pool.release(extent)

    # That nothing else is held, the world checks.


async def test_what_can_never_fit_is_refused_for_good(world: World) -> None:
    decode = await world.decode(num_blocks=8)
    for parts, mode in (([tokens(100)], ReuseMode.EXACT), ([tokens(1), *[doc(33, i) for i in range(3)]], LINKED)):
        with pytest.raises(InvalidRequest, match="blocks"):
            await ask(decode, parts, SamplingParams(max_tokens=20), mode)
    await ask(decode, [tokens(100)], SamplingParams(max_tokens=16))


@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(100, 16), (97, 16), (112, 16), (20, 96), (33, 80)])
async def test_what_just_fits_the_memory_of_a_device_is_answered(
    world: World, num_prompt: int, max_tokens: int
) -> None:
    """Eight blocks, all taken. What the prompt has in a page that is not full goes without its copy before the tail."""
    device = DeviceSettings(row_buckets=(1, 2), min_parts=16)
    adapter = ModelAdapter.load(world.model)
    engine = Engine(adapter, load_decode(world.model), num_blocks=8, block_size=16, device=device)
    decode = await world.decode(engine=engine)
    params = SamplingParams(max_tokens=max_tokens)
    expected = world.expect([tokens(num_prompt)], params)
    assert (await ask(decode, [tokens(num_prompt)], params)).token_ids == list(expected.token_ids)
    with pytest.raises(InvalidRequest, match="9 blocks"):
        await ask(decode, [tokens(num_prompt)], SamplingParams(max_tokens=max_tokens + 16))


async def test_too_many_waiting_are_told_to_come_back(world: World) -> None:
    decode = await world.decode(max_running=1, max_waiting=2)
    with held_engine(decode.thread) as release:
        asked = [asyncio.ensure_future(ask(decode, [tokens(5)], GREEDY)) for _ in range(3)]
        await eventually(lambda: decode.admission.num_waiting == 2)
        with pytest.raises(Busy) as caught:
            await ask(decode, [tokens(5)], GREEDY)
        assert (caught.value.field, caught.value.limit) == ("max_waiting", "2")
        release()
        await asyncio.gather(*asked)
