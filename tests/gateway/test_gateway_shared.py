"""Documents of the tenant `shared`: reused by all where a gateway is told to, touched by none."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest
from gateway_fakes import FINGERPRINT, MODEL, SECRET, UTF8_ANSWER, WAIT_S, FakeDecode, fails_after, record
from gateway_worlds import World, document_part, ids_part, text_request, world

from spolia.v1 import common_pb2, decode_pb2, directory_pb2, gateway_pb2
from spolia_core.errors import InternalError
from spolia_core.ids import SHARED_TENANT
from spolia_core.reuse import PREFIX_CHUNK_TOKENS
from spolia_gateway.served_models import ModelKey
from spolia_gateway.tokenizer import Form, PartTokenizer

TENANT = "museum"
TEXTS = ("the stones", "of one building", "are cut and set")
LINKED, EXACT = common_pb2.REUSE_MODE_LINKED, common_pb2.REUSE_MODE_EXACT


def id_of(model: Path, text: str, tenant_id: str) -> bytes:
    """The id of a document under a tenant."""
    ids = ModelKey(MODEL, FINGERPRINT, "float32").id_space(SECRET, tenant_id)
    return ids.local(PartTokenizer.from_model(model).encode(text, Form.DOCUMENT, tenant_id=tenant_id))


def share(w: World, model: Path, *texts: str) -> list[bytes]:
    """Has the store keep documents under `shared`, as operators do; their ids there."""
    ids = [id_of(model, text, SHARED_TENANT) for text in texts]
    w.store.objects.update({(SHARED_TENANT, chunk_id): 64 for chunk_id in ids})
    return ids


def asking(texts: Sequence[str] = TEXTS, mode: common_pb2.ReuseMode.ValueType = LINKED) -> gateway_pb2.GenerateRequest:
    request = text_request("read: ", mode=mode)
    request.parts.extend(document_part(text) for text in texts)
    return request


def named(request: decode_pb2.DecodeServiceGenerateRequest) -> list[bytes]:
    return [part.chunk_id for part in request.parts if part.chunk_id]


def counted(w: World) -> tuple[float, ...]:
    """Documents shared, not shared, and not asked about."""
    name, value = "spolia_gateway_shared_documents_total", w.node.server.metrics.value
    return tuple(value(name, outcome=outcome) for outcome in ("shared", "own", "unasked"))


async def test_a_stored_shared_document_is_named_by_its_shared_id_and_others_by_their_own(model: Path) -> None:
    a = FakeDecode("a")
    async with world(model, decodes=[a], tenant=TENANT, shared_documents=True) as w:
        (shared_id,) = share(w, model, TEXTS[1])
        await w.generate(asking([*TEXTS, TEXTS[1]]))
        (request,) = a.requests
        first, last = (id_of(model, text, TENANT) for text in (TEXTS[0], TEXTS[2]))
        assert named(request) == [first, shared_id, last, shared_id]
        assert request.tenant_id == TENANT
        (lookup,) = w.store.lookups
        assert (lookup.tenant_id, lookup.fingerprint) == (SHARED_TENANT, FINGERPRINT)
        assert list(lookup.chunk_ids) == [id_of(model, text, SHARED_TENANT) for text in TEXTS]
        assert counted(w) == (1, 2, 0)


async def test_sharing_changes_no_token_of_the_prompt(model: Path) -> None:
    a = FakeDecode("a")
    async with world(model, decodes=[a], shared_documents=True) as w:
        await w.generate(asking())
        share(w, model, *TEXTS)
        await w.generate(asking())
        own, shared = a.requests
        assert [part.token_ids for part in own.parts] == [part.token_ids for part in shared.parts]
        assert [bool(part.chunk_id) for part in own.parts] == [bool(part.chunk_id) for part in shared.parts]
        assert not set(named(own)) & set(named(shared))


async def test_what_another_tenant_stored_is_not_shared(model: Path) -> None:
    a = FakeDecode("a")
    async with world(model, decodes=[a], tenant=TENANT, shared_documents=True) as w:
        w.store.objects["another", id_of(model, TEXTS[0], "another")] = 64
        await w.generate(asking())
        assert named(a.requests[0]) == [id_of(model, text, TENANT) for text in TEXTS]
        assert counted(w) == (0, 3, 0)


async def test_nothing_is_shared_and_no_store_is_asked_unless_it_is_set(model: Path) -> None:
    a = FakeDecode("a")
    async with world(model, decodes=[a], tenant=TENANT) as w:
        share(w, model, *TEXTS)
        await w.generate(asking())
        assert named(a.requests[0]) == [id_of(model, text, TENANT) for text in TEXTS]
        assert (w.store.lookups, counted(w)) == ([], (0, 0, 0))


@pytest.mark.parametrize("what", ["EXACT", "no documents", "the tenant shared"])
async def test_requests_that_nothing_can_be_shared_with_ask_no_store(model: Path, what: str) -> None:
    a = FakeDecode("a")
    tenant = SHARED_TENANT if what == "the tenant shared" else TENANT
    async with world(model, decodes=[a], tenant=tenant, shared_documents=True) as w:
        share(w, model, *TEXTS)
        await w.generate(asking([] if what == "no documents" else TEXTS, EXACT if what == "EXACT" else LINKED))
        expected = [id_of(model, text, SHARED_TENANT) for text in TEXTS] if tenant == SHARED_TENANT else []
        assert named(a.requests[0]) == expected
        assert (w.store.lookups, counted(w)) == ([], (0, 0, 0))


@pytest.mark.parametrize("store", ["away", "late", "failing"])
async def test_a_store_that_cannot_say_costs_the_sharing_and_not_the_request(model: Path, store: str) -> None:
    a = FakeDecode("a")
    async with world(model, decodes=[a], tenant=TENANT, shared_documents=True) as w:
        share(w, model, *TEXTS)
        if store == "away":
            await w.directory_server.stop(None)
        elif store == "late":
            w.store.lookup_hold = asyncio.Event()
        else:
            w.store.lookup_error = InternalError("the index is gone")
        streamed = await w.generate(asking())
        assert tuple(streamed.token_ids) == UTF8_ANSWER.token_ids
        assert named(a.requests[0]) == [id_of(model, text, TENANT) for text in TEXTS]
        assert counted(w) == (0, 0, 3)


async def test_a_late_store_leaves_most_of_the_time_to_the_request(model: Path) -> None:
    a = FakeDecode("a")
    async with world(model, decodes=[a], shared_documents=True) as w:
        w.store.lookup_hold = asyncio.Event()
        await w.generate(asking(), timeout=2.0)
        await w.generate(asking(), timeout=600.0)
        assert a.remaining_s[0] > 1.0
        assert a.remaining_s[1] > 590.0


async def test_a_node_that_holds_the_shared_chunk_is_preferred_to_one_that_holds_the_tenants_own(model: Path) -> None:
    a, b = FakeDecode("a"), FakeDecode("b")
    async with world(model, decodes=[a, b], tenant=TENANT, shared_documents=True) as w:
        (shared_id,) = share(w, model, TEXTS[0])
        w.directory.put(
            record("a", address=a.address, held=[id_of(model, TEXTS[0], TENANT)]),
            record("b", address=b.address, held=[shared_id]),
        )
        await w.sees(lambda view: all(node.held_chunks for node in view.nodes(directory_pb2.NODE_ROLE_DECODE)))
        await w.generate(asking(TEXTS[:1]))
        assert (len(a.requests), len(b.requests)) == (0, 1)


async def test_a_prefix_keeps_its_tenants_ids_where_a_document_behind_it_is_shared(model: Path) -> None:
    nodes = [FakeDecode("a"), FakeDecode("b")]
    async with world(model, decodes=nodes, tenant=TENANT, shared_documents=True) as w:
        share(w, model, TEXTS[0])
        head = list(range(10, 10 + PREFIX_CHUNK_TOKENS + 5))
        request = gateway_pb2.GenerateRequest(parts=[ids_part(*head), document_part(TEXTS[0])], mode=LINKED)
        await w.generate(request)
        (sent,) = [request for node in nodes for request in node.requests]
        live = [token_id for part in sent.parts if not part.chunk_id for token_id in part.token_ids]
        ids = ModelKey(MODEL, FINGERPRINT, "float32").id_space(SECRET, TENANT)
        prefix, other = next(ids.prefix_chain(live)), ids.prefix(None, [1])
        for holder in nodes:
            num_before = len(holder.requests)
            held = {node.node_id: [prefix if node is holder else other] for node in nodes}
            w.directory.put(*(record(n.node_id, address=n.address, prefixes=held[n.node_id]) for n in nodes))
            await w.sees(
                lambda view, held=held: all(  # type: ignore[misc]  # bound in the loop
                    node.held_prefixes == held[node.node_id] for node in view.nodes(directory_pb2.NODE_ROLE_DECODE)
                )
            )
            await w.generate(request)
            assert len(holder.requests) == num_before + 1


async def test_a_replay_names_what_the_first_node_was_told(model: Path) -> None:
    a, b = FakeDecode("a", fails_after(2, grpc.StatusCode.UNAVAILABLE)), FakeDecode("b")
    async with world(model, decodes=[a, b], tenant=TENANT, shared_documents=True) as w:
        share(w, model, *TEXTS)
        await w.generate(asking())
        assert b.requests[0].HasField("resume")
        assert named(a.requests[0]) == named(b.requests[0]) == [id_of(model, text, SHARED_TENANT) for text in TEXTS]
        assert len(w.store.lookups) == 1


async def test_a_tenant_that_forgets_a_document_leaves_the_shared_copy(model: Path) -> None:
    a = FakeDecode("a")
    async with world(model, decodes=[a], num_prefills=1, tenant=TENANT, shared_documents=True) as w:
        (shared_id,) = share(w, model, TEXTS[0])
        documents = [gateway_pb2.Document(text=TEXTS[0])]
        async for warmed in w.stub.Warm(gateway_pb2.WarmRequest(documents=documents), timeout=WAIT_S):
            assert not warmed.already_stored, "a tenant warms its own copy"
        own_id = id_of(model, TEXTS[0], TENANT)
        assert w.store.objects.keys() == {(SHARED_TENANT, shared_id), (TENANT, own_id)}
        dropped = await w.stub.Forget(gateway_pb2.ForgetRequest(documents=documents), timeout=WAIT_S)
        assert dropped.num_stored_dropped == 1
        assert w.store.objects.keys() == {(SHARED_TENANT, shared_id)}
        (prefill,) = w.prefills.values()
        assert [list(drop.chunk_ids) for fake in (a, prefill) for drop in fake.drops] == [[own_id], [own_id]]
        await w.generate(asking(TEXTS[:1]))
        assert named(a.requests[0]) == [shared_id]


async def test_operators_forget_the_shared_copy(model: Path) -> None:
    a = FakeDecode("a")
    async with world(model, decodes=[a], tenant=SHARED_TENANT) as w:
        (shared_id,) = share(w, model, TEXTS[0])
        request = gateway_pb2.ForgetRequest(documents=[gateway_pb2.Document(text=TEXTS[0])])
        assert (await w.stub.Forget(request, timeout=WAIT_S)).num_stored_dropped == 1
        assert not w.store.objects
        assert list(a.drops[0].chunk_ids) == [shared_id]
