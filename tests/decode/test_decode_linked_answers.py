"""LINKED answers equal a single process's, wherever their chunks came from; each chunk comes once."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from decode_requests import COMPILED, DEVICE, HOST, LINKED, LINKED_PROMPTS
from tiny_answers import ask, assert_same
from tiny_cluster import Doc, Parts, World, count_calls, doc, ids_of, prompt_of, tokens

from spolia.v1 import decode_pb2
from spolia.v1.decode_pb2_grpc import DecodeServiceStub
from spolia_core.reuse import MissReason
from spolia_core.sampling import SamplingParams

GREEDY = SamplingParams(max_tokens=12)


def num_tokens(parts: Parts) -> int:
    return sum(len(part.token_ids if isinstance(part, Doc) else part) for part in parts)


def num_last_piece(parts: Parts) -> int:
    """Tokens behind the last fragment: they are computed every time."""
    return len(parts[-1]) if isinstance(parts[-1], list) else 1


@pytest.mark.parametrize("name", LINKED_PROMPTS)
async def test_linked_cold_resident_and_from_the_store(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    store = await world.store()
    prefill = await world.prefill()
    decode, fresh = await world.decode(), await world.decode()
    compiles = count_calls(monkeypatch, prefill.engine, "compile_steps")
    parts = LINKED_PROMPTS[name]
    expected = world.expect(parts, GREEDY, LINKED)
    cold = await ask(decode, parts, GREEDY, LINKED)
    assert_same(cold, expected)
    num_reused = cold.sources.get(COMPILED, 0)
    distinct = {part.token_ids for part in parts if not isinstance(part, list) and len(part.token_ids) > 16}
    assert len(compiles) == len(distinct) == len(store.store.tiers.ram)
    assert {m.reason for m in cold.report.misses} == ({MissReason.NOT_FOUND} if num_reused else set())
    warm = await ask(decode, parts, GREEDY, LINKED)
    assert_same(warm, expected)
    await decode.parts.publisher.drain()
    elsewhere = await ask(fresh, parts, GREEDY, LINKED)
    assert_same(elsewhere, expected)
    # What stands before the last document, and its link tokens, are known too when all of the prompt comes again.
    num_again = num_tokens(parts) - num_last_piece(parts) if num_reused else 0
    assert warm.sources.get(DEVICE, 0) == elsewhere.sources.get(HOST, 0) == num_again >= num_reused
    assert not warm.report.misses
    assert not elsewhere.report.misses
    assert warm.report.chunk_bytes == warm.report.inline_bytes == warm.report.live_bytes == 0
    assert len(compiles) == len(distinct)
    assert cold.report.link_tokens_per_chunk == 16


async def test_linked_with_a_dead_store_travels_inline(world: World) -> None:
    store = await world.store()
    prefill = await world.prefill()
    decode = await world.decode()
    await world.kill_store(store)
    parts = LINKED_PROMPTS["three"]
    answer = await ask(decode, parts, GREEDY, LINKED)
    assert_same(answer, world.expect(parts, GREEDY, LINKED))
    assert {miss.reason for miss in answer.report.misses} == {MissReason.STORE_UNREACHABLE}
    assert answer.report.nodes == [decode.config.node_id, prefill.config.node_id]
    assert answer.report.inline_bytes > 260 * decode.engine.adapter.kv_shape.bytes_per_token
    assert answer.report.chunk_bytes == 0


async def test_a_full_store_still_answers_inline(world: World) -> None:
    await world.store(budget_bytes=1000)
    await world.prefill()
    decode = await world.decode()
    parts = LINKED_PROMPTS["one"]
    answer = await ask(decode, parts, GREEDY, LINKED)
    assert_same(answer, world.expect(parts, GREEDY, LINKED))
    assert answer.sources[COMPILED] == 44
    assert answer.report.inline_bytes > 0


async def test_concurrent_requests_share_one_arrival_of_each_chunk(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.store()
    prefill = await world.prefill()
    decode = await world.decode()
    compiles = count_calls(monkeypatch, prefill.engine, "compile_steps")
    documents = [doc(40, seed) for seed in range(4)]
    prompts = [[tokens(2), documents[i % 4], documents[(i + 1) % 4], tokens(5, i)] for i in range(8)]
    answers = await asyncio.gather(*(ask(decode, parts, GREEDY, LINKED) for parts in prompts))
    for answer, parts in zip(answers, prompts, strict=True):
        assert_same(answer, world.expect(parts, GREEDY, LINKED))
    assert len(compiles) == 4
    object_bytes = 40 * decode.engine.adapter.kv_shape.bytes_per_token
    assert sum(answer.report.chunk_bytes for answer in answers) < 5 * (object_bytes + 2048)
    assert sum(answer.sources.get(COMPILED, 0) for answer in answers) == 4 * 24


async def test_drop_forgets_a_chunk_here(world: World) -> None:
    decode = await world.decode()
    parts = LINKED_PROMPTS["one"]
    await ask(decode, parts, GREEDY, LINKED)
    document = prompt_of(parts, ids_of(decode.engine)).parts[1].chunk_id
    assert document is not None
    request = decode_pb2.DropRequest(tenant_id="tenant", chunk_ids=[document, bytes(32)])
    async with grpc.aio.insecure_channel(decode.server.address) as channel:
        assert (await DecodeServiceStub(channel).Drop(request)).num_dropped == 1
        assert (await DecodeServiceStub(channel).Drop(request)).num_dropped == 0
    assert (await ask(decode, parts, GREEDY, LINKED)).sources[COMPILED] == 44
