"""A LINKED request takes an exact prefix, linked chunks and local chunks together, and reads chunks as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from tiny_answers import ask, assert_same, generate_request, resume, send
from tiny_cluster import NUM_LAYERS, World, doc, eventually, is_idle, tokens

from spolia_core.errors import Unavailable
from spolia_core.reuse import ChunkKind, MissReason, ReuseMode, TokenSource
from spolia_core.sampling import SamplingParams
from spolia_decode.node import DecodeNode
from spolia_node.store_stream import FetchedChunk
from spolia_worker.claims import ChunkClaims, ClaimOutcome
from spolia_worker.costs import Comparison, NodeCosts

GREEDY = SamplingParams(max_tokens=8)
LINKED, EXACT = ReuseMode.LINKED, ReuseMode.EXACT
COMPUTED, LINK, DEVICE = TokenSource.COMPUTED, TokenSource.LINK, TokenSource.DEVICE
HEAD, A, B = tokens(300, 7), doc(70, 1), doc(90, 2)
PARTS = [HEAD, A, B, tokens(9, 3)]


async def test_the_second_identical_context_computes_its_question_only(world: World) -> None:
    node = await world.decode()
    first = await ask(node, PARTS, GREEDY, LINKED)
    assert (first.sources[COMPUTED], first.sources[LINK]) == (309, 32)
    again = await ask(node, PARTS, GREEDY, LINKED)
    assert dict(again.sources) == {COMPUTED: 9, DEVICE: 460}
    other_question = await ask(node, [HEAD, A, B, tokens(11, 4)], GREEDY, LINKED)
    assert dict(other_question.sources) == {COMPUTED: 11, DEVICE: 460}
    for answer, parts in ((first, PARTS), (again, PARTS), (other_question, [HEAD, A, B, tokens(11, 4)])):
        assert_same(answer, world.expect(parts, GREEDY, LINKED))


async def test_another_order_keeps_the_prefix_and_the_documents(world: World) -> None:
    node = await world.decode()
    await ask(node, PARTS, GREEDY, LINKED)
    shuffled = [HEAD, B, A, tokens(9, 3)]
    answer = await ask(node, shuffled, GREEDY, LINKED)
    assert dict(answer.sources) == {COMPUTED: 300 - 256 + 9, LINK: 32, DEVICE: 256 + 54 + 74}
    assert_same(answer, world.expect(shuffled, GREEDY, LINKED))


async def test_exact_requests_touch_neither_local_nor_linked_chunks(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.store()
    node = await world.decode()
    for _ in range(2):
        await ask(node, PARTS, GREEDY, LINKED)
    await node.parts.publisher.drain()
    asked: list[bytes] = []
    acquire = node.engine.resident.acquire
    monkeypatch.setattr(node.engine.resident, "acquire", lambda chunk_id: asked.append(chunk_id) or acquire(chunk_id))
    other = {*node.engine.resident.held(ChunkKind.LOCAL), *node.engine.resident.held(ChunkKind.LINKED)}
    assert len(other) == 2 + 2
    exact = await ask(node, PARTS, GREEDY, EXACT)
    assert dict(exact.sources) == {COMPUTED: 469 - 256, DEVICE: 256}
    assert_same(exact, world.expect(PARTS, GREEDY, EXACT))
    assert not other & set(asked)


async def test_an_exact_answer_s_prefix_serves_linked_requests_over_documents_too(world: World) -> None:
    node = await world.decode()
    await ask(node, PARTS, GREEDY, EXACT)
    linked = await ask(node, PARTS, GREEDY, LINKED)
    # The head, document A and 14 tokens of B are exact; two of its link tokens stand behind them.
    assert dict(linked.sources) == {COMPUTED: 9, LINK: 2, DEVICE: 384, TokenSource.COMPILED: 74}


async def test_a_chat_behind_documents_goes_on_from_what_was_answered(world: World) -> None:
    await world.store()
    node, elsewhere = await world.decode(), await world.decode()
    long = SamplingParams(max_tokens=300)
    first = await ask(node, PARTS, long, LINKED)
    turn = [*PARTS, [*first.token_ids[:-1], *tokens(5, 8)]]
    again = await ask(node, turn, GREEDY, LINKED)
    # The question and the answer fill two blocks behind the last document.
    assert again.sources[COMPUTED] == 9 + 299 + 5 - 256
    assert_same(again, world.expect(turn, GREEDY, LINKED))
    await node.parts.publisher.drain()
    there = await ask(elsewhere, turn, GREEDY, LINKED)
    assert there.sources[COMPUTED] == 9 + 299 + 5 - 256
    assert there.sources[TokenSource.HOST] > 256 + 256
    assert_same(there, world.expect(turn, GREEDY, LINKED))


async def test_a_replay_behind_linked_chunks_goes_on_with_the_same_tokens(world: World) -> None:
    node = await world.decode()
    request = generate_request(node, PARTS, SamplingParams(max_tokens=12), LINKED)
    whole = await send(node, request)
    replay = await resume(node, request, whole.token_ids[:5])
    assert replay.token_ids == whole.token_ids[5:]


class LastLayerLater:
    """A store from which the last layer of each chunk comes when `gate` is set."""

    def __init__(self, behind: Any, layer_bytes: int) -> None:
        self.gate = asyncio.Event()
        self.lost = False
        self._behind = behind
        self._layer_bytes = layer_bytes

    async def lookup(self, *args: Any) -> Any:
        return await self._behind.lookup(*args)

    async def get(self, *args: Any, on_bytes: Any) -> AsyncIterator[FetchedChunk]:
        later: list[tuple[int, Any, int, memoryview]] = []

        def without_the_last(index: int, info: Any, offset: int, data: memoryview) -> None:
            num_now = min(len(data), max(0, info.size_bytes - self._layer_bytes - offset))
            if num_now or not data:
                on_bytes(index, info, offset, data[:num_now])
            if data[num_now:]:
                later.append((index, info, offset + num_now, memoryview(bytes(data[num_now:]))))

        async for chunk in self._behind.get(*args, on_bytes=without_the_last):
            await self.gate.wait()
            if self.lost:
                raise Unavailable("killed in mid-fetch")
            for came in later:
                on_bytes(*came)
            later.clear()
            yield chunk


async def a_slow_store(world: World, monkeypatch: pytest.MonkeyPatch) -> tuple[DecodeNode, LastLayerLater, list[int]]:
    """A node that has to fetch document A, its store, and the layers that its link pass has run."""
    await world.store()
    giver, node = await world.decode(), await world.decode()
    await ask(giver, [tokens(3), A, tokens(9, 3)], GREEDY, LINKED)
    await giver.parts.publisher.drain()
    slow = LastLayerLater(node.parts.store, node.engine.adapter.kv_shape.layer_bytes(70))
    monkeypatch.setattr(node.parts.fetcher, "_store", slow)
    seen: list[int] = []
    original = node.engine.linked_context_steps

    def watched(*args: Any) -> Any:
        return original(*args[:-1], replace(args[-1], on_layer=lambda run, layer: seen.append(layer)))

    monkeypatch.setattr(node.engine, "linked_context_steps", watched)
    return node, slow, seen


LATE_PARTS = [tokens(3), A, tokens(9, 3)]


async def test_layers_are_read_before_the_last_has_come(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    node, slow, seen = await a_slow_store(world, monkeypatch)
    asking = asyncio.ensure_future(ask(node, LATE_PARTS, GREEDY, LINKED))
    await eventually(lambda: seen == [0, 1])
    assert not asking.done()
    # A pass that waits keeps nobody else from the engine.
    assert_same(await ask(node, [tokens(20)], GREEDY), world.expect([tokens(20)], GREEDY))
    slow.gate.set()
    answer = await asking
    assert_same(answer, world.expect(LATE_PARTS, GREEDY, LINKED))
    assert answer.sources[TokenSource.HOST] == 54
    assert seen == list(range(NUM_LAYERS))


async def test_a_chunk_lost_after_some_layers_were_read_is_computed_and_the_pass_begun_anew(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, slow, seen = await a_slow_store(world, monkeypatch)
    asking = asyncio.ensure_future(ask(node, LATE_PARTS, GREEDY, LINKED))
    await eventually(lambda: seen == [0, 1])
    slow.lost = True
    slow.gate.set()
    answer = await asking
    assert_same(answer, world.expect(LATE_PARTS, GREEDY, LINKED))
    assert [miss.reason for miss in answer.report.misses] == [MissReason.STORE_UNREACHABLE]
    assert answer.sources[TokenSource.COMPILED] == 54
    assert seen == [0, 1, *range(NUM_LAYERS)]


async def test_a_request_that_ends_while_its_pass_waits_frees_everything(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, _, seen = await a_slow_store(world, monkeypatch)
    asking = asyncio.ensure_future(ask(node, LATE_PARTS, GREEDY, LINKED))
    await eventually(lambda: seen == [0, 1])
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await eventually(lambda: is_idle(node.engine.pool), "the pass or the fetch holds memory")


async def test_what_comes_slower_than_it_is_computed_is_computed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.store()
    giver, node = await world.decode(), await world.decode(cost_gate=True)
    await ask(giver, LATE_PARTS, GREEDY, LINKED)
    await giver.parts.publisher.drain()
    monkeypatch.setattr(NodeCosts, "compare", lambda *_: Comparison(fetch_s=2.0, compute_s=1.0))
    answer = await ask(node, LATE_PARTS, GREEDY, LINKED)
    assert_same(answer, world.expect(LATE_PARTS, GREEDY, LINKED))
    assert [miss.reason for miss in answer.report.misses] == [MissReason.SLOWER_THAN_COMPUTING]
    assert answer.report.chunk_bytes == 0


async def test_a_store_that_says_it_has_what_it_cannot_give_is_believed_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.store()
    node = await world.decode()
    asked = 0

    async def stored(*_: Any) -> ClaimOutcome:
        nonlocal asked
        asked += 1
        return ClaimOutcome.STORED

    monkeypatch.setattr(ChunkClaims, "_ask", stored)
    answer = await ask(node, LATE_PARTS, GREEDY, LINKED)
    assert_same(answer, world.expect(LATE_PARTS, GREEDY, LINKED))
    assert answer.sources[TokenSource.COMPILED] == 54
    assert asked == 2
