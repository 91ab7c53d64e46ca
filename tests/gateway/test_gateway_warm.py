"""Documents are computed once, by whoever can, and forgotten everywhere."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest
from captured_logs import captured_logs
from gateway_fakes import FINGERPRINT, WAIT_S, FakeDecode, record
from gateway_worlds import World, document_part, text_request, world

from spolia.errors import error_from_rpc
from spolia.v1 import common_pb2, directory_pb2, gateway_pb2, kvstore_pb2, prefill_pb2
from spolia_core.errors import Busy, DeadlineExceeded, InvalidRequest, NotFound, SpoliaError, Unavailable
from spolia_gateway.store_failures import not_kept

TEXTS = ("the stones", "of one building", "are cut and set")


def documents(texts: Sequence[str] = TEXTS) -> list[gateway_pb2.Document]:
    return [gateway_pb2.Document(text=text, name=f"d{index}") for index, text in enumerate(texts)]


async def warm(w: World, texts: Sequence[str] = TEXTS, **changes: str) -> list[gateway_pb2.WarmResponse]:
    request = gateway_pb2.WarmRequest(documents=documents(texts), **changes)
    responses = [response async for response in w.stub.Warm(request, timeout=WAIT_S)]
    return sorted(responses, key=lambda response: response.document_index)


async def failure(w: World, request: gateway_pb2.WarmRequest | gateway_pb2.ForgetRequest) -> SpoliaError:
    if isinstance(request, gateway_pb2.ForgetRequest):
        call = w.stub.Forget(request, timeout=WAIT_S)
    else:
        call = w.stub.Warm(request, timeout=WAIT_S).read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from_rpc(caught.value)


def compiled(w: World) -> list[bytes]:
    return [chunk_id for fake in w.prefills.values() for chunk_id in fake.compiled]


async def test_warming_twice_computes_once(model: Path) -> None:
    async with world(model, decodes=[FakeDecode("a")], num_prefills=2, tenant="museum") as w:
        first = await warm(w, request_id="w-1")
        assert [(r.document_index, r.already_stored) for r in first] == [(0, False), (1, False), (2, False)]
        again = await warm(w)
        assert [(r.document_index, r.already_stored) for r in again] == [(0, True), (1, True), (2, True)]
        assert [r.size_bytes for r in again] == [r.size_bytes for r in first] == [64 * r.num_tokens for r in first]
        assert len(compiled(w)) == len(set(compiled(w))) == 3
        starts = [start for fake in w.prefills.values() for start in fake.starts]
        assert {(s.request_id, s.tenant_id, s.fingerprint) for s in starts} == {("w-1", "museum", FINGERPRINT)}


async def test_what_was_warmed_is_what_a_prompt_names(model: Path) -> None:
    a = FakeDecode("a")
    async with world(model, decodes=[a], num_prefills=1) as w:
        await warm(w)
        request = text_request("read: ", mode=common_pb2.REUSE_MODE_LINKED)
        request.parts.extend(document_part(text) for text in reversed(TEXTS))
        await w.generate(request)
        named = {part.chunk_id for part in a.requests[0].parts if part.chunk_id}
        assert named == set(compiled(w))


async def test_a_document_named_twice_is_computed_once(model: Path) -> None:
    async with world(model, decodes=[FakeDecode("a")], num_prefills=1) as w:
        responses = await warm(w, ("the stones", "are cut", "the stones"))
        assert [r.already_stored for r in responses] == [False, False, True]
        assert responses[0].size_bytes == responses[2].size_bytes
        assert len(compiled(w)) == 2


async def test_work_spreads_over_prefill_nodes_within_bounds(model: Path) -> None:
    async with world(model, decodes=[FakeDecode("a")], num_prefills=2, warm_concurrency=4) as w:
        hold = asyncio.Event()
        for fake in w.prefills.values():
            fake.hold = hold
        call = asyncio.ensure_future(warm(w, [f"stones {number}" for number in range(10)]))
        for fake in w.prefills.values():
            await asyncio.wait_for(fake.started.wait(), WAIT_S)
        hold.set()
        assert len(await asyncio.wait_for(call, WAIT_S)) == 10
        assert sum(fake.max_running for fake in w.prefills.values()) <= 4
        assert min(len(fake.compiled) for fake in w.prefills.values()) >= 2


async def test_each_document_is_reported_when_it_is_done(model: Path) -> None:
    async with world(model, decodes=[FakeDecode("a")], num_prefills=1) as w:
        await warm(w, TEXTS[:1])
        (prefill,) = w.prefills.values()
        prefill.hold = asyncio.Event()
        stream = aiter(w.stub.Warm(gateway_pb2.WarmRequest(documents=documents()), timeout=WAIT_S))
        first = await anext(stream)
        assert (first.document_index, first.already_stored) == (0, True)
        prefill.hold.set()
        assert sorted([response.document_index async for response in stream]) == [1, 2]


@pytest.mark.parametrize("error", [Unavailable("draining"), Busy("full")])
async def test_another_prefill_node_takes_over(model: Path, error: SpoliaError) -> None:
    async with world(model, decodes=[FakeDecode("a")], num_prefills=2) as w:
        broken, sound = w.prefills.values()
        broken.error = error
        w.directory.put(record(sound.node_id, directory_pb2.NODE_ROLE_PREFILL, sound.address, queued_tokens=1000))
        await w.sees(lambda view: view.nodes(directory_pb2.NODE_ROLE_PREFILL)[1].load.queued_tokens == 1000)
        assert len(await warm(w)) == 3
        assert len(broken.starts) == 3
        assert len(sound.compiled) == 3


async def test_a_prefill_node_that_dies_is_replaced(model: Path) -> None:
    async with world(model, decodes=[FakeDecode("a")], num_prefills=2) as w:
        dying, sound = w.prefills.values()
        dying.hold = asyncio.Event()
        w.directory.put(record(sound.node_id, directory_pb2.NODE_ROLE_PREFILL, sound.address, queued_tokens=1000))
        await w.sees(lambda view: view.nodes(directory_pb2.NODE_ROLE_PREFILL)[1].load.queued_tokens == 1000)
        call = asyncio.ensure_future(warm(w, TEXTS[:1]))
        await asyncio.wait_for(dying.started.wait(), WAIT_S)
        await dying.server.stop(None)
        (response,) = await asyncio.wait_for(call, WAIT_S)
        assert not response.already_stored
        assert len(sound.compiled) == 1


async def test_dropping_the_stream_cancels_the_work(model: Path) -> None:
    async with world(model, decodes=[FakeDecode("a")], num_prefills=1) as w:
        (prefill,) = w.prefills.values()
        prefill.hold = asyncio.Event()
        call = w.stub.Warm(gateway_pb2.WarmRequest(documents=documents(TEXTS[:1])), timeout=WAIT_S)
        await asyncio.wait_for(prefill.started.wait(), WAIT_S)
        call.cancel()
        await asyncio.wait_for(prefill.ended.wait(), WAIT_S)
        await w.idle()
        assert (prefill.num_running, w.node.gateway.num_running) == (0, 0)


async def test_without_prefill_nodes_warming_says_so(model: Path) -> None:
    async with world(model, decodes=[FakeDecode("a")]) as w:
        error = await failure(w, gateway_pb2.WarmRequest(documents=documents()))
        assert isinstance(error, Unavailable)
        assert "no prefill node serves model 'tiny'" in error.message


async def test_warming_waits_while_every_prefill_node_is_busy(model: Path) -> None:
    async with world(model, decodes=[FakeDecode("a")], num_prefills=2, max_attempts=2) as w:
        for fake in w.prefills.values():
            fake.busy_times = 3
        responses = await warm(w, TEXTS[:1])
        assert not responses[0].already_stored
        assert sum(len(fake.starts) for fake in w.prefills.values()) == 7


async def test_waiting_for_busy_prefill_nodes_ends_with_the_deadline(model: Path) -> None:
    async with world(model, decodes=[FakeDecode("a")], num_prefills=1, default_timeout_s=0.5) as w:
        next(iter(w.prefills.values())).error = Busy("full", retry_after_ms=20)
        stream = aiter(w.stub.Warm(gateway_pb2.WarmRequest(documents=documents(TEXTS[:1]))))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(stream)
        assert isinstance(error_from_rpc(caught.value), DeadlineExceeded)


async def test_the_last_failure_is_told_when_all_prefill_nodes_fail(model: Path) -> None:
    async with world(model, decodes=[FakeDecode("a")], num_prefills=2) as w:
        for fake in w.prefills.values():
            fake.error = Unavailable("draining")
        with captured_logs() as lines:
            error = await failure(w, gateway_pb2.WarmRequest(documents=documents(TEXTS[:1]), request_id="w-1"))
        assert isinstance(error, Unavailable)
        said = [line for line in lines if line["event"] == "compile failed"]
        assert [line["said"] for line in said] == [
            f"{w.prefills[line['prefill_node']].address}: UNAVAILABLE: draining" for line in said
        ]
        assert len(said) == 2
        assert error.message == f"node {said[-1]['prefill_node']} cannot go on with request w-1 now; try again"


async def test_a_document_no_store_could_keep_is_not_called_warm(model: Path) -> None:
    async with world(model, decodes=[FakeDecode("a")], num_prefills=2) as w:
        for fake in w.prefills.values():
            fake.outcome = prefill_pb2.CHUNK_OUTCOME_INLINE
        error = await failure(w, gateway_pb2.WarmRequest(documents=documents(TEXTS[:1])))
        assert isinstance(error, Unavailable)
        assert "no store kept its" in error.message
        assert "900 of 1000 bytes are in use" in error.message
        assert (error.limit, error.actual.endswith(" bytes")) == ("1000 bytes", True)
        assert len(compiled(w)) == 1


def test_a_quota_that_is_in_the_way_is_named() -> None:
    held = kvstore_pb2.TenantStats(tenant_id="acme", num_objects=3, num_bytes=90, quota_bytes=100)
    stats = kvstore_pb2.GetStatsResponse(used_bytes=500, budget_bytes=1000, tenants=[held])
    error = not_kept("acme", b"\x01", 20, stats)
    assert "tenant acme holds 90 of 100 bytes and 3 of any number of objects of its quota" in error.message
    assert (error.limit, error.retry_after_ms > 0) == ("100 bytes", True)
    assert not_kept("acme", b"\x01", 101, stats).retry_after_ms == 0, "it will never fit"
    assert "quota;" not in not_kept("bloom", b"\x01", 20, stats).message


@pytest.mark.parametrize("kind", [gateway_pb2.WarmRequest, gateway_pb2.ForgetRequest])
async def test_a_store_that_is_away_is_told_in_words(
    model: Path, kind: type[gateway_pb2.WarmRequest] | type[gateway_pb2.ForgetRequest]
) -> None:
    async with world(model, decodes=[FakeDecode("a")], num_prefills=1) as w:
        await w.directory_server.stop(None)
        error = await failure(w, kind(documents=documents()))
        assert isinstance(error, Unavailable)
        assert "is the kvstore process running" in error.message
        assert "ipv4" not in error.message
        assert "connect" not in error.message


async def test_a_store_that_goes_away_while_a_document_is_computed_is_told_in_words(model: Path) -> None:
    async with world(model, decodes=[FakeDecode("a")], num_prefills=1) as w:
        (prefill,) = w.prefills.values()
        prefill.outcome, prefill.hold = prefill_pb2.CHUNK_OUTCOME_INLINE, asyncio.Event()
        call = asyncio.ensure_future(failure(w, gateway_pb2.WarmRequest(documents=documents(TEXTS[:1]))))
        await asyncio.wait_for(prefill.started.wait(), WAIT_S)
        await w.directory_server.stop(None)
        prefill.hold.set()
        assert "is the kvstore process running" in (await call).message


async def test_a_document_another_computed_meanwhile_was_stored_already(model: Path) -> None:
    async with world(model, decodes=[FakeDecode("a")], num_prefills=1) as w:
        next(iter(w.prefills.values())).outcome = prefill_pb2.CHUNK_OUTCOME_FOUND
        (response,) = await warm(w, TEXTS[:1])
        assert response.already_stored


async def test_bad_warm_requests_reach_no_node(model: Path) -> None:
    async with world(model, decodes=[FakeDecode("a")], num_prefills=1) as w:
        for request in (gateway_pb2.WarmRequest(), gateway_pb2.WarmRequest(documents=documents(["the stones", ""]))):
            assert isinstance(await failure(w, request), InvalidRequest)
        wrong = gateway_pb2.WarmRequest(documents=documents(), model="other")
        assert isinstance(await failure(w, wrong), NotFound)
        assert not any(fake.starts for fake in w.prefills.values())


async def test_forgetting_reaches_the_store_and_every_node_that_keeps_chunks(model: Path) -> None:
    a, b = FakeDecode("a"), FakeDecode("b")
    async with world(model, decodes=[a, b], num_prefills=1, tenant="museum") as w:
        await warm(w)
        w.directory.put(record("b", address=b.address, draining=True))  # it may hold the document all the same
        await w.sees(lambda view: len(view.nodes(directory_pb2.NODE_ROLE_DECODE)) == 1)
        stored = sum(w.store.objects.values())
        request = gateway_pb2.ForgetRequest(documents=documents(TEXTS[:2]))
        dropped = await w.stub.Forget(request, timeout=WAIT_S)
        (prefill,) = w.prefills.values()
        assert (dropped.num_stored_dropped, dropped.num_resident_dropped) == (2, 6)
        assert dropped.stored_bytes_dropped == stored - sum(w.store.objects.values())
        assert len(w.store.objects) == 1
        for fake in (a, b, prefill):
            (drop,) = fake.drops
            assert drop.tenant_id == "museum"
            assert set(drop.chunk_ids) == set(compiled(w)) - {key[1] for key in w.store.objects}
        again = await w.stub.Forget(request, timeout=WAIT_S)
        assert (again.num_stored_dropped, again.stored_bytes_dropped) == (0, 0)


async def test_a_document_that_no_context_holds_any_more_is_forgotten_too(model: Path) -> None:
    served = directory_pb2.ServedModel()
    served.CopyFrom(record("a").model)
    async with world(model, decodes=[FakeDecode("a")], num_prefills=1, served=served) as w:
        await warm(w, TEXTS[:2])
        served.max_context_tokens = 2
        w.directory.put(record("a", address=w.decodes["a"].address, model=served))
        await w.sees(
            lambda view: [n.model.max_context_tokens for n in view.nodes(directory_pb2.NODE_ROLE_DECODE)] == [2]
        )
        error = await failure(w, gateway_pb2.WarmRequest(documents=documents(TEXTS[:1])))
        assert isinstance(error, InvalidRequest)
        dropped = await w.stub.Forget(gateway_pb2.ForgetRequest(documents=documents(TEXTS[:2])), timeout=WAIT_S)
        assert dropped.num_stored_dropped == 2
        assert not w.store.objects


async def test_what_is_not_forgotten_everywhere_is_an_error_that_names_the_node(model: Path) -> None:
    a, b = FakeDecode("a", drop_error=Unavailable("no answer")), FakeDecode("b")
    async with world(model, decodes=[a, b], num_prefills=1) as w:
        await warm(w)
        error = await failure(w, gateway_pb2.ForgetRequest(documents=documents()))
        assert isinstance(error, Unavailable)
        assert error.actual == "a"
        assert not w.store.objects
        (prefill,) = w.prefills.values()
        assert len(b.drops) == len(prefill.drops) == 1


async def test_a_store_and_a_prefill_node_that_fail_keep_no_other_from_forgetting(model: Path) -> None:
    a = FakeDecode("a")
    async with world(model, decodes=[a], num_prefills=2) as w:
        await warm(w)
        w.store.delete_error = Unavailable("the store is shutting down")
        w.prefills["prefill-0"].error = Unavailable("draining")
        error = await failure(w, gateway_pb2.ForgetRequest(documents=documents()))
        assert isinstance(error, Unavailable)
        assert error.actual == "store, prefill-0"
        assert "the store cannot be reached" in error.message
        assert len(a.drops) == len(w.prefills["prefill-1"].drops) == 1
        w.store.delete_error = w.prefills["prefill-0"].error = None
        again = await w.stub.Forget(gateway_pb2.ForgetRequest(documents=documents()), timeout=WAIT_S)
        assert again.num_stored_dropped == 3
