"""Compiling chunks: stored, found or inline; computed once however many ask; bad work refused before memory is held."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from prefill_streams import compile_work, context_work, leave, read_until, start_of, streaming, whole
from tiny_cluster import (
    Doc,
    World,
    claim_as,
    count_calls,
    doc,
    eventually,
    held_engine,
    ids_of,
    stored,
    stored_bytes,
    tokens,
)

from spolia.v1.prefill_pb2 import (
    CHUNK_OUTCOME_FOUND,
    CHUNK_OUTCOME_INLINE,
    CHUNK_OUTCOME_STORED,
    ChunkToCompile,
    CompileWork,
    LayerAck,
    PrefillRequest,
    PrefillResponse,
    PrefillStart,
)
from spolia_core.chunk_object import parse_chunk_object
from spolia_core.digests import digest
from spolia_core.errors import Busy, InvalidRequest, NotSupported, SpoliaError, Unavailable
from spolia_engine.steps import Pause, Steps
from spolia_kvstore.entry import Reader
from spolia_kvstore.objects import ObjectKey
from spolia_prefill.node import PrefillNode

DOCUMENTS = [doc(40, 1), doc(64, 2), doc(17, 3)]


def outcomes(responses: list[PrefillResponse]) -> list[int]:
    return [r.chunk.outcome for r in responses if r.HasField("chunk")]


def inline_objects(responses: list[PrefillResponse]) -> dict[bytes, bytes]:
    """Objects that came inline, by id, every digest and offset checked."""
    found: dict[bytes, bytearray] = {}
    info = None
    for response in responses:
        if response.HasField("chunk"):
            info = response.chunk.info
        elif response.HasField("inline_frame"):
            assert info is not None
            frame, data = response.inline_frame, found.setdefault(info.chunk_id, bytearray())
            assert (frame.offset, digest(frame.data)) == (len(data), frame.digest)
            data += frame.data
            if len(data) == info.size_bytes:
                assert digest(data) == info.digest
    return {chunk_id: bytes(data) for chunk_id, data in found.items()}


async def compiled(node: PrefillNode, documents: list[Doc], inline: list[Doc] | None = None) -> list[PrefillResponse]:
    return await whole(node, start_of(node, compile=compile_work(node, documents, inline or [])))


async def test_a_chunk_is_computed_and_stored_then_found(world: World) -> None:
    store = await world.store()
    node, other = await world.prefill(), await world.prefill()
    responses = await compiled(node, DOCUMENTS)
    assert outcomes(responses) == [CHUNK_OUTCOME_STORED] * 3
    assert responses[-1].done.num_computed_tokens == 40 + 64 + 17
    for document in DOCUMENTS:
        data = stored_bytes(store, ids_of(node.engine).local(document.token_ids))
        assert parse_chunk_object(data).meta.num_tokens == len(document.token_ids)
    for again in (node, other):
        responses = await compiled(again, DOCUMENTS)
        assert outcomes(responses) == [CHUNK_OUTCOME_FOUND] * 3
        assert (responses[-1].done.num_computed_tokens, responses[-1].done.num_cached_tokens) == (0, 121)
        assert all(r.chunk.info.size_bytes for r in responses if r.HasField("chunk"))


async def test_a_chunk_asked_for_inline_travels_whole(world: World) -> None:
    store = await world.store()
    node = await world.prefill()
    responses = await compiled(node, DOCUMENTS, inline=DOCUMENTS[:2])
    objects = inline_objects(responses)
    ids = ids_of(node.engine)
    assert set(objects) == {ids.local(d.token_ids) for d in DOCUMENTS[:2]}
    assert len(store.store.tiers.ram) == 1
    for data in objects.values():
        parse_chunk_object(data)


@pytest.mark.parametrize("store_is", ["none", "dead", "full"])
async def test_a_chunk_that_no_store_takes_travels_whole(world: World, store_is: str) -> None:
    if store_is != "none":
        store = await world.store(budget_bytes=1000)
    node = await world.prefill()
    if store_is == "dead":
        await world.kill_store(store)
    responses = await compiled(node, DOCUMENTS)
    assert outcomes(responses) == [CHUNK_OUTCOME_INLINE] * 3
    assert len(inline_objects(responses)) == 3
    assert responses[-1].done.num_computed_tokens == 121


async def test_a_chunk_named_twice_is_one_chunk(world: World) -> None:
    await world.store()
    node = await world.prefill()
    assert outcomes(await compiled(node, [DOCUMENTS[0], DOCUMENTS[0]])) == [CHUNK_OUTCOME_STORED]


async def test_nodes_and_requests_compute_each_chunk_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.store()
    nodes = [await world.prefill(), await world.prefill()]
    calls = [count_calls(monkeypatch, node.engine, "compile_steps") for node in nodes]
    documents = [doc(30 + i, i) for i in range(10)]
    answers = await asyncio.gather(*(compiled(nodes[i % 2], documents[i % 3 :]) for i in range(12)))
    assert sum(map(len, calls)) == len(documents)
    computed = sum(answer[-1].done.num_computed_tokens for answer in answers)
    assert computed == sum(len(document.token_ids) for document in documents)


async def test_a_claim_of_somebody_who_died_is_taken_over_when_it_lapses(world: World) -> None:
    store = await world.store()
    node = await world.prefill()
    chunk_id = ids_of(node.engine).local(DOCUMENTS[0].token_ids)
    await claim_as(node, chunk_id, "somebody/else", ttl_ms=300)
    responses = await compiled(node, DOCUMENTS)
    assert outcomes(responses) == [CHUNK_OUTCOME_STORED] * 3
    assert responses[-2].chunk.info.chunk_id == chunk_id  # the others did not wait for it
    assert stored(store, chunk_id) is not None


async def test_a_claim_held_too_long_is_not_waited_for(world: World) -> None:
    await world.store()
    node = await world.prefill(store_share=0.01)
    await claim_as(node, ids_of(node.engine).local(DOCUMENTS[0].token_ids), "somebody/else", ttl_ms=60_000)
    assert outcomes(await compiled(node, DOCUMENTS[:1])) == [CHUNK_OUTCOME_STORED]


async def test_a_chunk_the_store_lost_after_saying_it_had_it_is_computed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await world.store()
    node, other = await world.prefill(), await world.prefill()
    await compiled(node, DOCUMENTS[:1])
    lookup = store.store.lookup

    async def evict_then_lookup(keys: Sequence[ObjectKey], reader: Reader) -> object:
        await store.store.delete(keys)
        return await lookup(keys, reader)

    monkeypatch.setattr(store.store, "lookup", evict_then_lookup)
    assert outcomes(await compiled(other, DOCUMENTS[:1])) == [CHUNK_OUTCOME_STORED]


@pytest.mark.parametrize("how", ["drop", "cancel", "half-close"])
async def test_a_compile_that_is_given_up_leaves_no_claim(world: World, how: str) -> None:
    store = await world.store()
    node = await world.prefill()
    with held_engine(node.thread):
        async with streaming(node, start_of(node, compile=compile_work(node, DOCUMENTS))) as call:
            await eventually(lambda: node.thread.queue_length == 3)
            assert store.store.claims.num_live() == 3
            await leave(call, how)
        await world.nothing_held()  # though the engine is still busy
    assert len(store.store.tiers.ram) == 0


async def test_a_pool_without_room_is_busy(world: World) -> None:
    store = await world.store()
    node = await world.prefill(num_blocks=2)
    with pytest.raises(Busy):
        await compiled(node, DOCUMENTS[:1])
    await world.nothing_held()
    assert store.store.claims.num_live() == 0
    assert outcomes(await compiled(node, DOCUMENTS[2:])) == [CHUNK_OUTCOME_STORED]


async def test_an_engine_that_fails_fails_the_job_and_frees_its_claims(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.store()
    node = await world.prefill()

    def fail(*_: object) -> Steps[None]:
        yield Pause(1)
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(node.engine, "compile_steps", fail)
        with pytest.raises(SpoliaError):
            await compiled(node, DOCUMENTS)
    await world.nothing_held()
    assert outcomes(await compiled(node, DOCUMENTS)) == [CHUNK_OUTCOME_STORED] * 3


GOOD = tokens(300)
BAD_STARTS = {
    "fingerprint": ({"fingerprint": b"x" * 32}, NotSupported),
    "accepted_codecs": ({"accepted_codecs": ["int3"]}, NotSupported),
    "tenant_id": ({"tenant_id": ""}, InvalidRequest),
    "compile.chunks": ({"compile": CompileWork()}, InvalidRequest),
    "compile.chunks[0].chunk_id": (
        {"compile": CompileWork(chunks=[ChunkToCompile(chunk_id=b"i" * 32, token_ids=[1, 2])])},
        InvalidRequest,
    ),
    "compile.chunks[0].token_ids": (
        {"compile": CompileWork(chunks=[ChunkToCompile(chunk_id=b"i" * 32, token_ids=[1, 9999])])},
        InvalidRequest,
    ),
    "context.token_ids": ({"context": context_work([])}, InvalidRequest),
    "context.num_cached_tokens": ({"context": context_work(GOOD, 100)}, InvalidRequest),
    "parts": ({"context": context_work(tokens(1536))}, InvalidRequest),
}


@pytest.mark.parametrize("field", BAD_STARTS)
async def test_bad_work_is_refused_by_field_before_memory_is_held(
    world: World, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    node = await world.prefill()
    change, kind = BAD_STARTS[field]
    work = {} if {"compile", "context"} & set(change) else {"context": context_work(GOOD)}
    monkeypatch.setattr(node.engine.pool, "allocate", None)  # nobody may get that far
    with pytest.raises(kind) as caught:
        await whole(node, start_of(node, **{**work, **change}))
    assert caught.value.field == field, caught.value


async def test_other_bad_work_is_refused(world: World) -> None:
    node = await world.prefill()
    ids = ids_of(node.engine)
    unknown_inline = CompileWork(
        chunks=[ChunkToCompile(chunk_id=ids.local([1]), token_ids=[1])], inline_chunks=[b"u" * 32]
    )
    for work, field in (
        ({"compile": unknown_inline}, "compile.inline_chunks"),
        ({"compile": compile_work(node, [doc(1536)])}, "parts"),
        ({"context": context_work(GOOD[:128], 128)}, "context.num_cached_tokens"),
        ({}, "work"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            await whole(node, start_of(node, **work))
        assert caught.value.field == field


async def refusal(node: PrefillNode, first: PrefillStart | None, *messages: PrefillRequest) -> SpoliaError:
    """What a node says to a stream of these messages, half-closed when there are none."""
    with pytest.raises(InvalidRequest) as caught:
        await say(node, first, messages)
    return caught.value


async def say(node: PrefillNode, first: PrefillStart | None, messages: Sequence[PrefillRequest]) -> None:
    async with streaming(node, first) as call:
        for message in messages:
            await call.write(message)
        if not messages:
            await call.done_writing()
        await read_until(call, "done")


async def test_messages_out_of_order_are_refused(world: World) -> None:
    node = await world.prefill()
    start = start_of(node, context=context_work(GOOD))
    ack, again = PrefillRequest(ack=LayerAck(layer=0)), PrefillRequest(start=start)
    assert (await refusal(node, None, ack)).field == "message"
    assert (await refusal(node, None)).field == "message"
    with held_engine(node.thread):
        assert (await refusal(node, start, again)).field == "message"
        assert (await refusal(node, start, PrefillRequest(ack=LayerAck(layer=77)))).field == "ack.layer"
        assert (await refusal(node, start, ack, ack)).field == "ack.layer"


async def test_a_full_node_is_busy_and_a_draining_one_unavailable(world: World) -> None:
    node = await world.prefill(max_running=1)
    with held_engine(node.thread):
        async with streaming(node, start_of(node, context=context_work(GOOD))) as call:
            await read_until(call, "live_header")
            assert (node.service.num_running, node.service.queued_tokens) == (1, 300)
            with pytest.raises(Busy) as caught:
                await whole(node, start_of(node, context=context_work(GOOD)))
            assert caught.value.field == "max_running"
            draining = asyncio.ensure_future(node.server.drain())
            await eventually(lambda: not node.server.accepting)
            with pytest.raises(Unavailable):
                await whole(node, start_of(node, context=context_work(GOOD)))
        await draining
