"""What may fail around a decode node, and that nothing is held afterwards. Each world checks that when it ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from decode_requests import GREEDY, LINKED, LINKED_PARTS, read_all
from tiny_answers import ask, assert_same, calling, generate_request
from tiny_cluster import World, claim_as, eventually, held_engine, ids_of, prompt_of, tokens

from spolia_core.errors import InternalError, Unavailable
from spolia_core.reuse import MissReason
from spolia_core.sampling import SamplingParams
from spolia_engine.next_tokens import accept_row


async def test_a_failed_step_fails_its_requests_and_no_later_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = await world.decode()
    step, left = decode.engine.decoding.step_logits, [1]

    def fails_once(sequences: Any) -> Any:
        if left:
            left.pop()
            raise RuntimeError("out of registers")
        return step(sequences)

    monkeypatch.setattr(decode.engine.decoding, "step_logits", fails_once)
    with held_engine(decode.thread):
        asked = [asyncio.ensure_future(ask(decode, [tokens(5, i)], GREEDY)) for i in range(3)]
        await eventually(lambda: decode.thread.queue_length == 3)
    results = await asyncio.gather(*asked, return_exceptions=True)
    failed = [r for r in results if isinstance(r, Exception)]
    assert failed
    assert all(isinstance(r, InternalError) and "out of registers" in str(r) for r in failed)
    for i in range(3):
        assert_same(await ask(decode, [tokens(5, i)], GREEDY), world.expect([tokens(5, i)], GREEDY))


async def test_one_sequence_that_cannot_go_on_fails_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = await world.decode()
    spoilt = SamplingParams(max_tokens=8, seed=13)

    def fails_for_one(generation: Any, row: Any) -> Any:
        if generation.params.seed == 13:
            raise InternalError("not a number")
        return accept_row(generation, row)

    monkeypatch.setattr("spolia_decode.batch.accept_row", fails_for_one)
    with held_engine(decode.thread):
        asked = [asyncio.ensure_future(ask(decode, [tokens(5, i)], spoilt if i == 1 else GREEDY)) for i in range(3)]
        await eventually(lambda: decode.thread.queue_length == 3)
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(results[1], InternalError)
    for i in (0, 2):
        assert not isinstance(results[i], BaseException)
        assert_same(results[i], world.expect([tokens(5, i)], GREEDY))


async def test_a_drain_finishes_running_streams_and_stores_their_answers(world: World) -> None:
    store = await world.store()
    decode = await world.decode()
    params = SamplingParams(max_tokens=150)
    async with calling(decode, generate_request(decode, [tokens(20)], params)) as call:
        await call.read()
        draining = asyncio.ensure_future(decode.server.drain())
        await eventually(lambda: not decode.server.accepting)
        with pytest.raises(Unavailable):
            await ask(decode, [tokens(5)], GREEDY)
        responses = await read_all(call)
    assert responses[-1].finish.num_generated_tokens == 150
    assert await draining
    await decode.close()
    world.workers.remove(decode)
    assert len(store.store.tiers.ram) == 1


async def test_a_claim_of_somebody_dead_is_waited_out_and_taken_over(world: World) -> None:
    store = await world.store()
    decode = await world.decode(store_share=0.02)
    chunk_id = prompt_of(LINKED_PARTS, ids_of(decode.engine)).parts[1].chunk_id
    assert chunk_id is not None
    await claim_as(decode, chunk_id, "somebody/else", ttl_ms=60_000)
    answer = await ask(decode, LINKED_PARTS, GREEDY, LINKED)
    assert [miss.reason for miss in answer.report.misses] == [MissReason.CLAIM_TIMEOUT]
    await eventually(lambda: len(store.store.tiers.ram) == 1)
