"""Single flight across a cluster: ten prefill nodes want the same missing chunk, and it is compiled once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from prefill_streams import compile_work, start_of, streaming, whole
from tiny_cluster import World, doc, eventually, held_engine, ids_of, stored

from spolia.v1.prefill_pb2 import CHUNK_OUTCOME_FOUND, CHUNK_OUTCOME_STORED
from spolia_prefill.node import PrefillNode

NUM_NODES = 10
DOCUMENT = doc(60, 5)


class Completed:
    """Counts the compilations that ran to their end, by node."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nodes: Sequence[PrefillNode]) -> None:
        self.by: list[str] = []
        for node in nodes:
            monkeypatch.setattr(node.engine, "compile_steps", self._counted(node, node.engine.compile_steps))

    def _counted(self, node: PrefillNode, compile_steps: Any) -> Any:
        def counted(*args: Any) -> Any:
            run = yield from compile_steps(*args)
            self.by.append(node.config.node_id)
            return run

        return counted


async def ten_nodes(world: World, **settings: Any) -> list[PrefillNode]:
    return [await world.prefill(node_id=f"prefill-{number}", **settings) for number in range(NUM_NODES)]


async def ask(node: PrefillNode) -> tuple[int, bytes]:
    """What became of the chunk at a node: its outcome, and the digest it answers with."""
    responses = await whole(node, start_of(node, compile=compile_work(node, [DOCUMENT])))
    (chunk,) = [response.chunk for response in responses if response.HasField("chunk")]
    return chunk.outcome, chunk.info.digest


def all_stored_once(answers: Sequence[tuple[int, bytes]]) -> bool:
    """Whether one node computed, the others found what it stored, and all speak of the same bytes."""
    outcomes = sorted(outcome for outcome, _ in answers)
    expected = sorted([CHUNK_OUTCOME_STORED, *[CHUNK_OUTCOME_FOUND] * (len(answers) - 1)])
    return outcomes == expected and len({digest for _, digest in answers}) == 1


def forget_claims(monkeypatch: pytest.MonkeyPatch, node: PrefillNode) -> None:
    """From now on the node dies without a word: no claim is given back."""
    monkeypatch.setattr(node.claims, "give_back", lambda *_: None)


async def test_of_ten_nodes_that_want_a_chunk_at_once_one_compiles_and_all_get_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.store()
    nodes = await ten_nodes(world)
    completed = Completed(monkeypatch, nodes)
    answers = await asyncio.gather(*(ask(node) for node in nodes))
    assert len(completed.by) == 1
    assert all_stored_once(answers)


async def test_when_the_node_that_compiles_dies_one_other_takes_over_as_it_leaves(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await world.store()
    first, *others = await ten_nodes(world)  # claims hold for 30 s: only a departure is as quick as this test
    completed = Completed(monkeypatch, [first, *others])
    chunk_id = ids_of(first.engine).local(DOCUMENT.token_ids)
    with held_engine(first.thread):
        async with streaming(first, start_of(first, compile=compile_work(first, [DOCUMENT]))):
            await eventually(lambda: store.store.claims.num_live() == 1)
            waiting = [asyncio.ensure_future(ask(node)) for node in others]
            await eventually(lambda: store.store.claims.num_waiters == len(others))
            forget_claims(monkeypatch, first)
            dying = asyncio.ensure_future(world.kill(first))
            answers = await asyncio.gather(*waiting)
    await dying
    assert len(completed.by) == 1
    assert all_stored_once(answers)
    assert stored(store, chunk_id) is not None


async def test_when_the_work_dies_and_its_node_lives_one_other_takes_over_as_the_claim_lapses(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await world.store()
    first, *others = await ten_nodes(world, claim_ttl_s=1.0)
    completed = Completed(monkeypatch, [first, *others])
    with held_engine(first.thread):
        async with streaming(first, start_of(first, compile=compile_work(first, [DOCUMENT]))) as call:
            await eventually(lambda: store.store.claims.num_live() == 1)
            waiting = [asyncio.ensure_future(ask(node)) for node in others]
            await eventually(lambda: store.store.claims.num_waiters == len(others))
            forget_claims(monkeypatch, first)
            call.cancel()
            answers = await asyncio.gather(*waiting)
    assert len(completed.by) == 1
    assert all_stored_once(answers)


async def test_what_a_chunk_cost_is_stored_with_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.store()
    node, other = await world.prefill(), await world.prefill()
    responses = await whole(node, start_of(node, compile=compile_work(node, [DOCUMENT])))
    (made,) = [response.chunk.info for response in responses if response.HasField("chunk")]
    assert 0 < made.compute_s < 10
    responses = await whole(other, start_of(other, compile=compile_work(other, [DOCUMENT])))
    (found,) = [response.chunk.info for response in responses if response.HasField("chunk")]
    assert found.compute_s == made.compute_s


async def test_waiting_for_the_engine_is_no_cost_of_a_chunk(world: World) -> None:
    await world.store()
    node = await world.prefill()
    with held_engine(node.thread) as release:
        asking = asyncio.ensure_future(whole(node, start_of(node, compile=compile_work(node, [DOCUMENT]))))
        await eventually(lambda: node.thread.queue_length == 1)
        await asyncio.sleep(1.0)
        release()
        responses = await asking
    (made,) = [response.chunk.info for response in responses if response.HasField("chunk")]
    assert 0 < made.compute_s < 1.0
