"""A prefill node that is bad, silent, dead or refuses costs time and nothing else."""

from __future__ import annotations

import pytest
from decode_requests import GREEDY, LINKED, LINKED_PARTS
from prefill_fakes import NODE_ID, SPOILERS, a_front, never_answers
from tiny_answers import ask, assert_same, generate_request, send
from tiny_cluster import World, held_engine, tokens

from spolia_core.reuse import ReuseMode, TokenSource


@pytest.mark.parametrize("name", SPOILERS)
@pytest.mark.parametrize("other_node", [True, False])
async def test_a_bad_prefill_node_costs_time_and_nothing_else(world: World, name: str, other_node: bool) -> None:
    await world.store()
    good = await world.prefill(slice_tokens=50)
    front, address = await a_front(world, good, SPOILERS[name])
    decode = await world.decode()
    await world.sees_prefill(decode, 2)
    if not other_node:
        assert decode.view is not None
        decode.view.mark_dead(good.config.node_id)
    answer = await ask(decode, [tokens(200)], GREEDY, prefill_hints=[address])
    assert_same(answer, world.expect([tokens(200)], GREEDY))
    assert front.num_calls == 1
    assert NODE_ID not in answer.report.nodes
    assert (good.config.node_id in answer.report.nodes) == other_node
    assert (answer.report.live_bytes > 0) == other_node


async def test_a_short_deadline_says_nothing_of_the_node_that_missed_it(world: World) -> None:
    await world.store()
    prefill = await world.prefill()
    decode = await world.decode()
    with held_engine(prefill.thread):
        late = await send(decode, generate_request(decode, [tokens(200)], GREEDY), 2.0)
    assert prefill.config.node_id not in late.report.nodes
    answer = await ask(decode, [tokens(200, 3)], GREEDY)
    assert prefill.config.node_id in answer.report.nodes
    assert_same(answer, world.expect([tokens(200, 3)], GREEDY))


async def test_a_bad_prefill_node_compiles_no_chunk_into_an_answer(world: World) -> None:
    store = await world.store()
    good = await world.prefill()
    front, address = await a_front(world, good, SPOILERS["spoils_a_frame"])
    decode = await world.decode()
    await world.sees_prefill(decode, 2)
    await world.kill_store(store)
    answer = await ask(decode, LINKED_PARTS, GREEDY, LINKED, prefill_hints=[address])
    assert_same(answer, world.expect(LINKED_PARTS, GREEDY, LINKED))
    assert front.num_calls == 1


async def test_a_silent_prefill_node_takes_its_share_of_the_time_only(world: World) -> None:
    await world.store()
    good = await world.prefill()
    front, address = await a_front(world, good, never_answers)
    decode = await world.decode(prefill_share=0.1)
    await world.sees_prefill(decode, 2)
    for parts, mode in (([tokens(200)], ReuseMode.EXACT), (LINKED_PARTS, LINKED)):
        answer = await ask(decode, parts, GREEDY, mode, prefill_hints=[address])
        assert_same(answer, world.expect(parts, GREEDY, mode))
        assert good.config.node_id in answer.report.nodes
        assert front.num_calls >= 1


async def test_a_dead_prefill_node_is_done_without(world: World) -> None:
    await world.store()
    prefill = await world.prefill()
    decode = await world.decode()
    await world.kill(prefill)
    answer = await ask(decode, [tokens(200)], GREEDY)
    assert_same(answer, world.expect([tokens(200)], GREEDY))
    assert answer.report.nodes == [decode.config.node_id]
    answer = await ask(decode, LINKED_PARTS, GREEDY, LINKED)
    assert_same(answer, world.expect(LINKED_PARTS, GREEDY, LINKED))
    assert answer.sources[TokenSource.COMPILED] == 44


async def test_a_prefill_node_that_refuses_is_done_without(world: World) -> None:
    await world.store()
    await world.prefill(num_blocks=4)  # no room for anything
    await world.prefill(max_context_tokens=64)  # an error that is not the request's
    decode = await world.decode()
    answer = await ask(decode, [tokens(200)], GREEDY)
    assert_same(answer, world.expect([tokens(200)], GREEDY))
    assert answer.report.nodes == [decode.config.node_id]
