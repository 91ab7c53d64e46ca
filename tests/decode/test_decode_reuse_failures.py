"""Reuse of documents when something fails: answers equal a single process's, misses say why, and nothing is held.

Each world checks at its end that no pool, claim or transfer holds anything. Prompts begin with live tokens, so every
document is linked; other kinds of reuse may add to what is counted here, never take from it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import pytest
from tiny_answers import Answer, ask, assert_same, calling, generate_request, send
from tiny_cluster import SECRET, TENANT, Doc, Parts, World, doc, eventually, ids_of, is_idle, tokens

from spolia.v1.common_pb2 import TokenPart
from spolia_core.ids import tenant_key
from spolia_core.reuse import ChunkKind, Miss, MissReason, ReuseMode, TokenSource
from spolia_core.sampling import SamplingParams
from spolia_decode.node import DecodeNode
from spolia_kvstore.node import KVStoreNode
from spolia_kvstore.objects import ObjectKey

LINKED = ReuseMode.LINKED
GREEDY = SamplingParams(max_tokens=8)
LINK_TOKENS = 16
DOCUMENTS = [doc(70, 1), doc(40, 2), doc(110, 3)]
WHOLE = sum(len(document.token_ids) for document in DOCUMENTS)
REUSABLE = WHOLE - LINK_TOKENS * len(DOCUMENTS)


def around(documents: Sequence[Doc]) -> Parts:
    return [tokens(3), *documents, tokens(9, 2)]


def local_misses(answer: Answer) -> list[Miss]:
    return [miss for miss in answer.report.misses if miss.kind is ChunkKind.LOCAL]


def reused(answer: Answer) -> int:
    return answer.report.num_reused_tokens


async def stored_by(world: World, store: KVStoreNode, parts: Parts, mode: ReuseMode = LINKED, count: int = 3) -> None:
    """Has a node of its own compute a prompt and store `count` chunks of it, and be gone."""
    node = await world.decode()
    await ask(node, parts, GREEDY, mode)
    await eventually(lambda: len(store.store.tiers.ram) >= count, "the chunks are not stored")
    await world.kill(node)


@pytest.mark.parametrize("source", [TokenSource.DEVICE, TokenSource.HOST], ids=lambda source: source.name)
async def test_documents_are_reused_in_every_order_and_answer_as_one_process_does(
    world: World, source: TokenSource
) -> None:
    store = await world.store()
    await world.prefill()
    await stored_by(world, store, around(DOCUMENTS))
    decode = await world.decode()
    if source is TokenSource.DEVICE:
        await ask(decode, around(DOCUMENTS), GREEDY, LINKED)
    for order in permutations(DOCUMENTS):
        parts = around(order)
        answer = await ask(decode, parts, GREEDY, LINKED)
        assert_same(answer, world.expect(parts, GREEDY, LINKED))
        assert answer.sources[source] >= REUSABLE, answer.sources
        assert TokenSource.COMPILED not in answer.sources
        assert not local_misses(answer)
        assert (answer.report.chunk_bytes > 0) == (source is TokenSource.HOST)
        if source is TokenSource.HOST:  # forgotten, so that the next order fetches again
            for document in order:
                assert decode.engine.resident.drop(ids_of(decode.engine).local(document.token_ids))


async def ask_as(decode: DecodeNode, tenant_id: str, document: Doc) -> Answer:
    """A document and a question, by a tenant under its own ids."""
    ids = decode.engine.id_space(tenant_key(SECRET.encode(), tenant_id))
    parts = [
        TokenPart(token_ids=tokens(3)),
        TokenPart(token_ids=document.token_ids, chunk_id=ids.local(document.token_ids)),
        TokenPart(token_ids=tokens(9, 2)),
    ]
    return await send(decode, generate_request(decode, [[1]], GREEDY, LINKED, parts=parts, tenant_id=tenant_id))


@pytest.mark.parametrize("where", ["in memory", "in the store"])
async def test_a_tenant_never_hits_the_same_document_of_another(world: World, where: str) -> None:
    await world.store()
    await world.prefill()
    first, document = await world.decode(), DOCUMENTS[2]
    expected = world.expect(around([document]), GREEDY, LINKED)
    assert_same(await ask_as(first, TENANT, document), expected)
    assert reused(await ask_as(first, TENANT, document)) > 0
    decode = first if where == "in memory" else await world.decode()
    other = await ask_as(decode, "another", document)
    assert_same(other, expected)
    assert reused(other) == 0, other.sources
    assert other.sources[TokenSource.COMPILED] == 110 - LINK_TOKENS
    assert [miss.reason for miss in local_misses(other)] == [MissReason.NOT_FOUND]
    assert reused(await ask_as(decode, "another", document)) > 0, "its own it hits"


@dataclass
class SpoiltGet:
    """A store's Get that the test may spoil: `before` runs once before the next, and after some messages, of all calls
    together, it stops.
    """

    before: Callable[[KVStoreNode], Awaitable[Any]] | None = None
    stuck_after: int | None = None
    stuck: asyncio.Event = field(default_factory=asyncio.Event)

    def prepare(self, node: KVStoreNode) -> None:
        service: Any = node._kvstore_server
        original = service.Get

        async def get(request: Any, context: Any) -> AsyncIterator[Any]:
            before, self.before = self.before, None
            if before is not None:
                await before(node)
            async for response in original(request, context):
                if self.stuck_after == 0:
                    self.stuck.set()
                    await asyncio.Event().wait()
                self.stuck_after = self.stuck_after and self.stuck_after - 1
                yield response

        service.Get = get


@pytest.mark.parametrize("with_prefill", [True, False], ids=["prefill", "alone"])
@pytest.mark.parametrize("num_responses", [1, 2, 3])
@pytest.mark.parametrize("mode", list(ReuseMode), ids=lambda mode: mode.name)
async def test_a_store_killed_in_mid_fetch_costs_what_had_not_come(
    world: World, mode: ReuseMode, num_responses: int, with_prefill: bool
) -> None:
    """A chunk is a header and one frame here. A prefix comes chunk by chunk: it breaks off in the first, between two,
    or in the second. Documents come side by side, so that only the least that was lost is sure.
    """
    get = SpoiltGet()
    store = await world.store(get.prepare)
    if with_prefill:
        await world.prefill()
    parts = around(DOCUMENTS) if mode is LINKED else [tokens(400)]
    await stored_by(world, store, parts, mode)
    decode = await world.decode(store_share=1.0)
    get.stuck_after = num_responses
    asked = asyncio.ensure_future(ask(decode, parts, GREEDY, mode))
    await asyncio.wait_for(get.stuck.wait(), 10)
    await world.kill_store(store)
    answer = await asked
    assert_same(answer, world.expect(parts, GREEDY, mode))
    kind = ChunkKind.LOCAL if mode is LINKED else ChunkKind.PREFIX
    reasons = [miss.reason for miss in answer.report.misses if miss.kind is kind]
    num_came = num_responses // 2
    assert set(reasons) == {MissReason.STORE_UNREACHABLE}
    if mode is LINKED:
        assert 3 - num_came <= len(reasons) <= 3
    else:
        assert len(reasons) == 3 - num_came
    assert (reused(answer) > 0) == (len(reasons) < 3)
    await eventually(lambda: is_idle(decode.engine.pool), "what broke off is still held")
    decode.engine.pool.check_invariants()


async def test_a_document_evicted_just_before_it_is_got_is_a_miss_of_its_own(world: World) -> None:
    """Whatever was looked up before."""
    get = SpoiltGet()
    store = await world.store(get.prepare)
    await world.prefill()
    await stored_by(world, store, around(DOCUMENTS))
    decode = await world.decode()
    gone = ids_of(decode.engine).local(DOCUMENTS[1].token_ids)
    get.before = lambda node: node.store.delete([ObjectKey(TENANT, gone)])
    answer = await ask(decode, around(DOCUMENTS), GREEDY, LINKED)
    assert_same(answer, world.expect(around(DOCUMENTS), GREEDY, LINKED))
    assert get.before is None
    assert [(m.chunk_id, m.reason, m.num_tokens) for m in local_misses(answer)] == [(gone, MissReason.NOT_FOUND, 40)]
    brought = answer.sources[TokenSource.HOST] + answer.sources.get(TokenSource.COMPILED, 0)
    assert brought >= REUSABLE, "a prefill node stored it again, computed or not"


async def test_a_document_named_often_is_fetched_once_and_counted_as_often(world: World) -> None:
    store = await world.store()
    await world.prefill()
    document = DOCUMENTS[0]
    await stored_by(world, store, around([document]), count=1)
    decode = await world.decode()
    parts = [tokens(3), document, tokens(5, 5), document, document, tokens(9, 2)]
    answer = await ask(decode, parts, GREEDY, LINKED)
    assert_same(answer, world.expect(parts, GREEDY, LINKED))
    assert answer.sources[TokenSource.HOST] >= 3 * (70 - LINK_TOKENS)
    assert not local_misses(answer)
    object_bytes = 70 * decode.engine.adapter.kv_shape.bytes_per_token
    assert object_bytes <= answer.report.chunk_bytes < 1.5 * object_bytes


async def test_linked_requests_cancelled_whenever_leave_nothing_on_any_node(world: World) -> None:
    """Cancels fall into looking up, fetching, compiling, linking and decoding, as they come."""
    store = await world.store()
    await world.prefill()
    nodes = [await world.decode(), await world.decode()]
    rng = random.Random(5)

    async def one(number: int) -> None:
        parts = around([doc(rng.randint(20, 200), rng.randint(0, 11)) for _ in range(3)])
        request = generate_request(nodes[number % 2], parts, SamplingParams(max_tokens=200), LINKED)
        async with calling(nodes[number % 2], request) as call:
            reading = asyncio.ensure_future(_read(call))
            await asyncio.wait([reading], timeout=rng.uniform(0, 0.25))
            call.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    for first in range(0, 40, 8):
        await asyncio.gather(*(one(first + i) for i in range(8)))
    await world.nothing_held()
    assert all(node.record().load.queued_tokens == 0 for node in nodes)
    assert store in world.stores
    assert_same(await ask(nodes[0], around(DOCUMENTS), GREEDY, LINKED), world.expect(around(DOCUMENTS), GREEDY, LINKED))


async def _read(call: Any) -> None:
    async for _ in call:
        pass
