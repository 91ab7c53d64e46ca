"""A decode node's answers equal a single process's, wherever the KV came from; and the report says where."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from decode_requests import COMPILED, COMPUTED, DEVICE, HOST, LINK, LINKED, LINKED_PROMPTS
from tiny_answers import ask, assert_same, generate_request, send
from tiny_cluster import World, damage, doc, eventually, ids_of, prompt_of, tokens

from spolia.v1 import common_pb2, decode_pb2
from spolia_core.errors import InvalidRequest, NotSupported
from spolia_core.reuse import ChunkKind, FinishReason, MissReason
from spolia_core.sampling import SamplingParams
from spolia_kvstore.entry import Reader
from spolia_kvstore.objects import ObjectKey

GREEDY = SamplingParams(max_tokens=12)


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 129, 300])
async def test_exact_cold_then_resident(world: World, num_tokens: int) -> None:
    await world.store()
    prefill = await world.prefill()
    decode = await world.decode()
    prompt = [tokens(num_tokens)]
    expected = world.expect(prompt, GREEDY)
    cold = await ask(decode, prompt, GREEDY)
    assert_same(cold, expected)
    assert cold.sources == {COMPUTED: num_tokens}
    warm = await ask(decode, prompt, GREEDY)
    assert_same(warm, expected)
    num_reusable = (num_tokens - 1) // 128 * 128
    assert warm.sources.get(DEVICE, 0) == num_reusable
    went_out = num_tokens > decode.config.local_prefill_tokens
    assert (prefill.config.node_id in cold.report.nodes) == went_out
    assert (cold.report.live_bytes > 0) == went_out
    per_token = decode.engine.adapter.kv_shape.bytes_per_token
    if warm.report.live_bytes:  # what is handed off does not grow with what is reused
        assert warm.report.live_bytes == (num_tokens - num_reusable) * per_token


@pytest.mark.parametrize("slice_tokens", [16, 100, 256])
async def test_a_prompt_handed_off_in_slices_gives_the_same_answer(world: World, slice_tokens: int) -> None:
    await world.store()
    prefill = await world.prefill(slice_tokens=slice_tokens)
    decode = await world.decode()
    for prompt in ([tokens(300)], [tokens(300), tokens(290, 4)]):  # cold, then behind a resident prefix
        answer = await ask(decode, prompt, GREEDY)
        assert_same(answer, world.expect(prompt, GREEDY))
        assert prefill.config.node_id in answer.report.nodes
        num_live = answer.sources[COMPUTED]
        assert answer.report.live_bytes == num_live * decode.engine.adapter.kv_shape.bytes_per_token


@pytest.mark.parametrize("num_tokens", [40, 300])  # computed by the decode node, and handed off
async def test_times_say_what_was_computing_and_what_waiting(world: World, num_tokens: int) -> None:
    await world.store()
    await world.prefill()
    decode = await world.decode()
    answer = await ask(decode, [tokens(num_tokens)], GREEDY)
    assert answer.finish is not None
    times = answer.finish.timings
    assert 0 < times.compute_ms < times.ttft_ms < times.e2e_ms
    assert 0 <= times.queue_ms < times.ttft_ms


async def test_exact_from_the_store_of_another_node(world: World) -> None:
    store = await world.store()
    first, second = await world.decode(), await world.decode()
    prompt = [tokens(400)]
    expected = world.expect(prompt, GREEDY)
    assert_same(await ask(first, prompt, GREEDY), expected)
    await eventually(lambda: len(store.store.tiers.ram) == 3, "three full blocks are published")
    answer = await ask(second, prompt, GREEDY)
    assert_same(answer, expected)
    assert answer.sources == {HOST: 384, COMPUTED: 16}
    assert answer.report.chunk_bytes > 384 * second.engine.adapter.kv_shape.bytes_per_token
    assert not answer.report.misses


@pytest.mark.parametrize("share_of_prefix", [1, 2])
async def test_a_prefix_that_is_partly_here_and_partly_stored(world: World, share_of_prefix: int) -> None:
    store = await world.store()
    first, second = await world.decode(), await world.decode()
    whole = tokens(300)
    await ask(first, [whole], GREEDY)
    await eventually(lambda: len(store.store.tiers.ram) == 2)
    await ask(second, [whole[: 128 * share_of_prefix + 5]], GREEDY)
    answer = await ask(second, [whole], GREEDY)
    assert_same(answer, world.expect([whole], GREEDY))
    # A shorter prompt brought its own blocks in, whether they came from the store then or now.
    assert answer.sources[DEVICE] == 128 * share_of_prefix
    assert answer.sources.get(HOST, 0) == 256 - 128 * share_of_prefix


async def test_without_store_or_prefill_a_node_computes_itself(world: World) -> None:
    decode = await world.decode()
    prompt, linked = [tokens(200)], [tokens(3), doc(60), tokens(9, 2)]
    answer = await ask(decode, prompt, GREEDY)
    assert_same(answer, world.expect(prompt, GREEDY))
    assert answer.report.nodes == [decode.config.node_id]
    assert [miss.reason for miss in answer.report.misses] == [MissReason.STORE_UNREACHABLE]
    answer = await ask(decode, linked, GREEDY, LINKED)
    assert_same(answer, world.expect(linked, GREEDY, LINKED))
    assert answer.sources == {COMPUTED: 12, LINK: 16, COMPILED: 44}
    in_order = [(run.source, run.num_tokens) for run in answer.report.runs]
    assert in_order == [(COMPUTED, 3), (LINK, 16), (COMPILED, 44), (COMPUTED, 9)]


async def test_requests_of_different_lengths_decode_together_and_alike(world: World) -> None:
    decode = await world.decode()
    params = [SamplingParams(max_tokens=n) for n in (1, 2, 5, 9, 17, 30)]
    prompts = [[tokens(5 + 30 * i, i)] for i in range(6)]
    answers = await asyncio.gather(*(ask(decode, p, s) for p, s in zip(prompts, params, strict=True)))
    for answer, parts, sampling in zip(answers, prompts, params, strict=True):
        assert_same(answer, world.expect(parts, sampling))
        assert answer.finish is not None
        assert answer.finish.reason == int(FinishReason.LENGTH)
        assert answer.finish.num_generated_tokens == sampling.max_tokens


async def test_stop_strings_end_an_answer_before_them(world: World) -> None:
    decode = await world.decode()
    whole = await ask(decode, [tokens(30)], SamplingParams(max_tokens=30))
    stop = whole.text[10:13]
    answer = await ask(decode, [tokens(30)], SamplingParams(max_tokens=30, stop=(stop,)))
    assert answer.finish is not None
    assert answer.finish.reason == int(FinishReason.STOP)
    assert answer.text == whole.text[: whole.text.index(stop)]


async def test_seeds_draw_what_a_single_process_draws(world: World) -> None:
    await world.store()
    await world.prefill()
    decode = await world.decode()
    drawn = set()
    for seed in (1, 2, 3):
        params = SamplingParams(temperature=1.3, top_p=0.95, top_k=40, seed=seed, max_tokens=12)
        answer = await ask(decode, [tokens(80)], params)
        assert answer.token_ids == list(world.expect([tokens(80)], params).token_ids)
        assert answer.finish is not None
        assert answer.finish.seed == seed
        drawn.add(tuple(answer.token_ids))
    assert len(drawn) == 3


async def test_publishing_can_be_turned_off(world: World) -> None:
    store = await world.store()
    decode = await world.decode(publish=False)
    await ask(decode, [tokens(140)], SamplingParams(max_tokens=130))
    await decode.parts.publisher.drain()
    assert len(store.store.tiers.ram) == 0


async def test_a_damaged_chunk_is_a_miss_and_never_an_answer(world: World) -> None:
    store = await world.store()
    await world.prefill()
    first, second = await world.decode(), await world.decode()
    exact, linked = [tokens(300)], LINKED_PROMPTS["one"]
    await ask(first, exact, GREEDY)
    await ask(first, linked, GREEDY, LINKED)
    await eventually(lambda: len(store.store.tiers.ram) == 3)
    chain = list(ids_of(first.engine).prefix_chain(exact[0]))
    document = prompt_of(linked, ids_of(first.engine)).parts[1].chunk_id
    assert document is not None
    damage(store, chain[0])
    damage(store, document)
    answer = await ask(second, exact, GREEDY)
    assert_same(answer, world.expect(exact, GREEDY))
    assert [(m.chunk_id, m.reason) for m in answer.report.misses] == [(i, MissReason.DIGEST) for i in chain]
    assert answer.sources == {COMPUTED: 300}
    answer = await ask(second, linked, GREEDY, LINKED)
    assert_same(answer, world.expect(linked, GREEDY, LINKED))
    assert [(m.chunk_id, m.kind, m.reason) for m in answer.report.misses] == [
        (document, ChunkKind.LOCAL, MissReason.DIGEST)
    ]


async def test_a_chunk_evicted_between_lookup_and_get_is_a_miss(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await world.store()
    first, second = await world.decode(), await world.decode()
    prompt = [tokens(400)]
    await ask(first, prompt, GREEDY)
    await eventually(lambda: len(store.store.tiers.ram) == 3)
    chain = list(ids_of(first.engine).prefix_chain(prompt[0]))
    lookup = store.store.lookup

    async def lookup_then_evict(keys: Sequence[ObjectKey], reader: Reader) -> object:
        entries = await lookup(keys, reader)
        await store.store.delete([keys[1]])
        return entries

    monkeypatch.setattr(store.store, "lookup", lookup_then_evict)
    answer = await ask(second, prompt, GREEDY)
    assert_same(answer, world.expect(prompt, GREEDY))
    assert answer.sources == {HOST: 128, COMPUTED: 272}
    assert [(m.chunk_id, m.reason) for m in answer.report.misses] == [(i, MissReason.NOT_FOUND) for i in chain[1:]]


async def test_tenants_share_nothing(world: World) -> None:
    await world.store()
    decode = await world.decode()
    prompt = [tokens(200)]
    await ask(decode, prompt, GREEDY)
    answer = await ask(decode, prompt, GREEDY, tenant_id="another")
    assert answer.sources == {COMPUTED: 200}


BAD_REQUESTS = {
    "fingerprint": ({"fingerprint": b"x" * 32}, NotSupported),
    "tenant_id": ({"tenant_id": ""}, InvalidRequest),
    "mode": ({"mode": 0}, InvalidRequest),
    "parts": ({"parts": []}, InvalidRequest),
    "parts[0].token_ids": ({"parts": [common_pb2.TokenPart()]}, InvalidRequest),
    "parts[1].token_ids": (
        {"parts": [common_pb2.TokenPart(token_ids=[1]), common_pb2.TokenPart(token_ids=[95])]},
        InvalidRequest,
    ),
    "parts[0].chunk_id": ({"parts": [common_pb2.TokenPart(token_ids=[1], chunk_id=b"i" * 32)]}, InvalidRequest),
    "sampling.max_tokens": ({"parts": [common_pb2.TokenPart(token_ids=[1] * 1530)]}, InvalidRequest),
    "resume.samples[0].token_ids": (
        {"resume": decode_pb2.Resume(samples=[decode_pb2.ResumedSample(token_ids=[1] * 13)])},
        InvalidRequest,
    ),
}


async def test_bad_requests_are_refused_by_field(world: World) -> None:
    decode = await world.decode()
    for field, (change, kind) in BAD_REQUESTS.items():
        with pytest.raises(kind) as caught:
            await send(decode, generate_request(decode, [tokens(5)], GREEDY, **change))
        assert caught.value.field == field, caught.value
