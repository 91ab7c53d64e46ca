"""Nodes of this release among nodes of a later one: they do what they know, and say by name what they do not."""

from __future__ import annotations

import grpc
import pytest
from newer_release import UNKNOWN_NUMBER, has_unknown_fields, newer
from tiny_answers import assert_same, generate_request, send
from tiny_cluster import TENANT, WAIT_S, Doc, World, doc, eventually, ids_of, tokens

from spolia.errors import error_from_rpc
from spolia.v1.decode_pb2 import DecodeServiceGenerateRequest
from spolia.v1.directory_pb2 import NODE_ROLE_DECODE, NodeRecord, RegisterRequest, WatchRequest
from spolia.v1.directory_pb2_grpc import DirectoryServiceStub
from spolia.v1.kvstore_pb2 import GetRequest, LookupRequest, PutHeader, PutRequest
from spolia.v1.kvstore_pb2_grpc import KVStoreServiceStub
from spolia.v1.prefill_pb2 import ChunkToCompile, CompileWork, PrefillRequest, PrefillResponse, PrefillStart
from spolia.v1.prefill_pb2_grpc import PrefillServiceStub
from spolia_core.errors import InvalidRequest, SpoliaError
from spolia_core.reuse import ReuseMode
from spolia_core.sampling import SamplingParams

GREEDY = SamplingParams(max_tokens=8)
PARTS: list[list[int] | Doc] = [tokens(9), doc(40, seed=1), tokens(5, seed=2)]


async def test_a_request_that_says_more_is_answered_all_the_same(world: World) -> None:
    await world.store()
    await world.prefill()
    decode = await world.decode()
    await world.sees_prefill(decode, 1)
    for mode in (ReuseMode.EXACT, ReuseMode.LINKED):
        request = newer(generate_request(decode, PARTS, GREEDY, mode))
        answer = await send(decode, request)
        if mode is ReuseMode.EXACT:
            assert_same(answer, world.expect(PARTS, GREEDY))
        assert answer.report.mode is mode


async def test_a_mode_that_is_yet_to_come_is_refused_by_name(world: World) -> None:
    decode = await world.decode()
    request: DecodeServiceGenerateRequest = generate_request(decode, PARTS, GREEDY)
    request.mode = UNKNOWN_NUMBER  # type: ignore[assignment]  # of no enum of this release
    with pytest.raises(SpoliaError) as caught:
        await send(decode, request)
    assert isinstance(caught.value, InvalidRequest)
    assert (caught.value.field, caught.value.actual) == ("mode", str(UNKNOWN_NUMBER))


async def prefilled(channel: grpc.aio.Channel, start: PrefillStart) -> list[PrefillResponse]:
    """All responses to a start message that says more than this release knows."""
    call = PrefillServiceStub(channel).Prefill(None, timeout=WAIT_S)
    await call.write(newer(PrefillRequest(start=start)))
    responses: list[PrefillResponse] = []
    while isinstance(response := await call.read(), PrefillResponse):
        responses.append(response)
    return responses


async def test_prefill_and_store_work_for_a_newer_node_and_refuse_work_of_unknown_kinds_by_name(world: World) -> None:
    store, prefill = await world.store(), await world.prefill()
    token_ids, fingerprint = tokens(40, seed=3), prefill.engine.adapter.fingerprint
    chunk = ChunkToCompile(chunk_id=ids_of(prefill.engine).local(token_ids), token_ids=token_ids)
    codecs = ["a codec of later", "raw"]
    start = PrefillStart(request_id="r", tenant_id=TENANT, fingerprint=fingerprint, accepted_codecs=codecs)
    async with grpc.aio.insecure_channel(prefill.server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await prefilled(channel, start)
        start.compile.CopyFrom(CompileWork(chunks=[chunk]))
        assert (await prefilled(channel, start))[-1].HasField("done")
    refused = error_from_rpc(caught.value)
    assert isinstance(refused, InvalidRequest)
    assert refused.field == "work"
    asked = {"tenant_id": TENANT, "chunk_ids": [chunk.chunk_id], "fingerprint": fingerprint}
    async with grpc.aio.insecure_channel(store.server.address) as channel:
        stub = KVStoreServiceStub(channel)
        found = await stub.Lookup(newer(LookupRequest(**asked, accepted_codecs=codecs)), timeout=WAIT_S)
        info = found.entries[0].info
        assert info.chunk_id == chunk.chunk_id
        got = [r async for r in stub.Get(newer(GetRequest(**asked, accepted_codecs=codecs)), timeout=WAIT_S)]
        frames = [response.frame for response in got if response.HasField("frame")]
        assert sum(len(frame.data) for frame in frames) == info.size_bytes
        requests = [PutRequest(header=PutHeader(tenant_id="other", info=info))]
        requests += [PutRequest(frame=frame) for frame in frames]
        put = stub.Put(None, timeout=WAIT_S)
        for request in requests:
            await put.write(newer(request))
        await put.done_writing()
        assert (await put).replica


async def test_a_directory_passes_on_what_newer_nodes_say_of_themselves(world: World) -> None:
    node = await world.store()
    record = NodeRecord(node_id="later", role=NODE_ROLE_DECODE, address="127.0.0.1:7", version="9.9.9")
    async with grpc.aio.insecure_channel(node.server.address) as channel:
        stub = DirectoryServiceStub(channel)
        register = stub.Register(None)
        await register.write(newer(RegisterRequest(record=record)))
        await register.read()
        watch = stub.Watch(newer(WatchRequest(roles=[NODE_ROLE_DECODE])), timeout=WAIT_S)
        async for snapshot in watch:
            (seen,) = snapshot.nodes
            break
        watch.cancel()
        register.cancel()
    assert (seen.node_id, seen.version) == ("later", "9.9.9")
    assert has_unknown_fields(seen), "a gateway of that release will understand"
    await eventually(lambda: not node.directory.nodes([NODE_ROLE_DECODE]))
