"""Where a context is linked: decided from measured costs, the same tokens either way, nothing held when it fails."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tiny_answers import ask, assert_same
from tiny_cluster import World, doc, eventually, held_engine, ids_of, is_idle, tokens

from spolia.v1.directory_pb2 import NodeLoad, NodeRecord
from spolia_core.errors import NotFound
from spolia_core.reuse import ReuseMode, TokenSource
from spolia_core.sampling import SamplingParams
from spolia_decode import link_pass
from spolia_decode.link_place import LinkPlace, LinkTask, Placed, place_link
from spolia_decode.node import DecodeNode
from spolia_prefill.link import Linker
from spolia_prefill.node import PrefillNode
from spolia_worker.costs import NodeCosts

GREEDY = SamplingParams(max_tokens=8)
LINKED = ReuseMode.LINKED
PARTS = [tokens(300, 7), doc(70, 1), tokens(150, 5), doc(90, 2), tokens(9, 3)]


def costs(compute_s_per_row: float = 0.01, bytes_per_s: float = 1e6) -> NodeCosts:
    known = NodeCosts(clock=lambda: 0.0)
    for rows in (10, 100):
        known.computed(rows, rows, compute_s_per_row * rows)
    known.fetched(TokenSource.HOST, 1_000_000, 1_000_000 / bytes_per_s)
    known.handed_over(1_000_000, 1_000_000 / bytes_per_s)
    return known


def task(num_rows: int = 100, row_bytes: int = 1000) -> LinkTask:
    return LinkTask(num_rows, 1000, {b"a" * 32: 50_000}, row_bytes)


def node(node_id: str, *, holds: bool = True, queued: int = 0) -> NodeRecord:
    return NodeRecord(node_id=node_id, held_chunks=[b"a" * 32] if holds else [], load=NodeLoad(queued_tokens=queued))


def placed(nodes: list[NodeRecord], known: NodeCosts | None = None, num_decoding: int = 4, rows: int = 100) -> Placed:
    return place_link(task(rows), nodes, known or costs(), num_decoding=num_decoding, min_rows=32)


def test_an_idle_decode_node_links_itself() -> None:
    assert placed([node("p")], num_decoding=0).place is LinkPlace.DECODE


def test_a_long_live_part_beside_decoding_sequences_goes_to_a_node_that_holds_the_chunks() -> None:
    decision = placed([node("p")])
    assert (decision.place, decision.node and decision.node.node_id) == (LinkPlace.PREFILL, "p")
    assert decision.predicted_s == pytest.approx(1.0 + 0.001, rel=0.01)
    assert decision.here_s == pytest.approx(1.0, rel=0.01)


def test_few_rows_and_unknown_costs_stay() -> None:
    assert placed([node("p")], rows=32).place is LinkPlace.DECODE
    assert placed([node("p")], NodeCosts()).place is LinkPlace.DECODE
    assert placed([]).place is LinkPlace.DECODE


def test_a_queue_or_chunks_to_fetch_weigh_against_a_node() -> None:
    assert placed([node("busy", queued=1000)]).place is LinkPlace.DECODE
    decision = placed([node("a", holds=False), node("b")])
    assert decision.node is not None
    assert decision.node.node_id == "b"
    slow = costs(bytes_per_s=1000.0)
    assert placed([node("a", holds=False)], slow).place is LinkPlace.DECODE


def links_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every link pass is to go to the first prefill node there is."""

    def place(work: LinkTask, nodes: Any, known: Any, **_: Any) -> Placed:
        return Placed(LinkPlace.PREFILL, nodes[0], 0.1, 0.1) if nodes else Placed(LinkPlace.DECODE, None, None)

    monkeypatch.setattr(link_pass, "place_link", place)


async def nodes_of(world: World) -> tuple[DecodeNode, PrefillNode]:
    await world.store()
    prefill = await world.prefill(slice_tokens=128)
    return await world.decode(link_on_prefill=True), prefill


async def test_rows_linked_on_a_prefill_node_give_the_same_answer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, prefill = await nodes_of(world)
    await ask(decode, [doc(70, 1), doc(90, 2), tokens(3)], GREEDY, LINKED)
    links_there(monkeypatch)
    answer = await ask(decode, PARTS, GREEDY, LINKED)
    assert_same(answer, world.expect(PARTS, GREEDY, LINKED))
    assert prefill.config.node_id in answer.report.nodes
    num_rows = 300 + 16 + 150 + 16 + 9
    assert answer.report.live_bytes == num_rows * decode.engine.adapter.kv_shape.bytes_per_token
    assert answer.sources[TokenSource.DEVICE] == 54 + 74
    # What came is registered as if it had been computed here.
    again = await ask(decode, PARTS, GREEDY, LINKED)
    assert again.sources[TokenSource.COMPUTED] == 9
    assert_same(again, world.expect(PARTS, GREEDY, LINKED))
    assert decode.server.metrics.value("spolia_decode_link_decisions_total", place="prefill") == 1


async def test_a_prefill_node_fetches_what_it_lacks(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, prefill = await nodes_of(world)
    await ask(decode, [doc(70, 1), doc(90, 2), tokens(3)], GREEDY, LINKED)
    for document in (doc(70, 1), doc(90, 2)):
        assert prefill.engine.resident.drop(ids_of(decode.engine).local(document.token_ids))
    links_there(monkeypatch)
    answer = await ask(decode, PARTS, GREEDY, LINKED)
    assert_same(answer, world.expect(PARTS, GREEDY, LINKED))


async def test_a_node_that_cannot_link_is_done_without(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, prefill = await nodes_of(world)
    links_there(monkeypatch)

    async def cannot(self: Linker, *_: Any) -> Any:
        raise NotFound("a chunk is not here")
        yield

    monkeypatch.setattr(Linker, "run", cannot)
    answer = await ask(decode, PARTS, GREEDY, LINKED)
    assert_same(answer, world.expect(PARTS, GREEDY, LINKED))
    assert answer.report.live_bytes == 0
    assert is_idle(prefill.engine.pool)


async def test_a_cancel_while_another_node_links_frees_both(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, prefill = await nodes_of(world)
    await ask(decode, [doc(70, 1), doc(90, 2), tokens(3)], GREEDY, LINKED)
    links_there(monkeypatch)
    with held_engine(prefill.thread):
        asking = asyncio.ensure_future(ask(decode, PARTS, GREEDY, LINKED))
        await eventually(lambda: prefill.thread.queue_length == 1)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await eventually(lambda: is_idle(decode.engine.pool), "the decode node holds memory")
    await world.nothing_held()


async def test_what_another_node_linked_is_not_checked_and_counted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.store()
    await world.prefill()
    decode = await world.decode(link_on_prefill=True, shadow_share=1.0)
    await ask(decode, [doc(70, 1), doc(90, 2), tokens(3)], GREEDY, LINKED)
    links_there(monkeypatch)
    await ask(decode, PARTS, GREEDY, LINKED)
    await eventually(lambda: num_checks(decode, "linked_elsewhere") == 1)
    await eventually(lambda: num_checks(decode, "done") == 1)


def num_checks(node: DecodeNode, outcome: str) -> float:
    samples = [sample for metric in node.server.metrics.registry.collect() for sample in metric.samples]
    return sum(
        sample.value
        for sample in samples
        if sample.name == "spolia_shadow_checks_total" and sample.labels["outcome"] == outcome
    )
