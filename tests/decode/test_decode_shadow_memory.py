"""Shadow checks on a node: that requests come first in memory, and how checks end."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import Any

import pytest
import torch
from shadow_worlds import BEGINS, GREEDY, LINKED, ended, figure, held_slice, outcomes, somebody_here
from tiny_answers import ask, assert_same, calling, generate_request, send
from tiny_cluster import WAIT_S, World, doc, eventually, is_idle, tokens

from spolia_core.errors import Busy
from spolia_core.reuse import ChunkKind, ReuseMode
from spolia_core.sampling import SamplingParams
from spolia_decode.node import DecodeNode
from spolia_decode.shadow import is_chosen
from spolia_decode.shadow_check import ShadowComparison
from spolia_engine.context import Context
from spolia_engine.extent import BlockState
from spolia_node.deadline import Deadline

# Requests come first in memory


async def test_a_waiting_check_gives_its_memory_to_a_request(world: World) -> None:
    node = await world.decode(num_blocks=24, shadow_share=1.0)  # 384 tokens
    async with somebody_here(node):
        await ask(node, BEGINS, GREEDY, LINKED)
        assert figure(node, "held_bytes") > 0
        parts = [tokens(340, 5)]
        assert_same(await ask(node, parts, GREEDY), world.expect(parts, GREEDY))
        assert outcomes(node) == {"gave_way": 1}
        assert figure(node, "held_bytes") == 0


@pytest.mark.parametrize("mode", list(ReuseMode), ids=lambda mode: mode.name)
async def test_a_running_check_gives_its_memory_to_a_request_after_its_slice(
    world: World, monkeypatch: pytest.MonkeyPatch, mode: ReuseMode
) -> None:
    node = await world.decode(num_blocks=24, shadow_share=1.0, shadow_slice_tokens=16)
    with held_slice(monkeypatch, 4) as (began, gate):
        await ask(node, BEGINS, GREEDY, LINKED, request_id="first")
        await asyncio.to_thread(began.wait, WAIT_S)
        parts = [tokens(340, 5)] if mode is ReuseMode.EXACT else [tokens(100, 5), doc(200, 6), tokens(20, 7)]
        asking = asyncio.ensure_future(ask(node, parts, GREEDY, mode, request_id="second"))
        await eventually(lambda: not node.admission.is_idle, "the request has not arrived")
        gate.set()
        answer = await asking
    assert_same(answer, world.expect(parts, GREEDY, mode))
    assert outcomes(node)["gave_way"] == 1


async def test_requests_that_lack_room_together_all_get_what_checks_held(world: World) -> None:
    node = await world.decode(num_blocks=48, shadow_share=1.0)
    async with somebody_here(node):
        for index in range(3):
            await ask(node, [doc(90, index), tokens(6)], GREEDY, LINKED, request_id=f"{index}")
        prompts = [[tokens(100, 50 + index)] for index in range(6)]  # 7 blocks each, and one of answer
        answers = await asyncio.gather(*(ask(node, prompt, GREEDY) for prompt in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_same(answer, world.expect(prompt, GREEDY))
    assert outcomes(node)["gave_way"] == 3


async def test_memory_that_came_free_since_a_request_tried_is_worth_another_try_whoever_freed_it(world: World) -> None:
    node = await world.decode(shadow_share=1.0)
    shadow, deadline = node.shadow, Deadline.after(WAIT_S)
    assert shadow is not None
    async with somebody_here(node):
        await ask(node, BEGINS, GREEDY, LINKED)
        before = shadow.num_ended
        assert await shadow.give_way(before, deadline), "this one frees it"
        assert await shadow.give_way(before, deadline), "this one had no room either, and there is some now"
        assert not await shadow.give_way(shadow.num_ended, deadline)


async def test_without_checks_to_give_way_a_request_is_told_that_there_is_no_room(world: World) -> None:
    node = await world.decode(num_blocks=24, shadow_share=1.0)
    extent = node.engine.pool.allocate(200)
    with pytest.raises(Busy):
        await ask(node, [tokens(340, 5)], GREEDY)
    node.engine.pool.release(extent)
    assert not outcomes(node)


def resident(node: DecodeNode) -> dict[ChunkKind, set[bytes]]:
    return {kind: set(node.engine.resident.held(kind)) for kind in ChunkKind}


async def test_a_check_evicts_nothing(world: World) -> None:
    plain, checked = await world.decode(num_blocks=24), await world.decode(num_blocks=24, shadow_share=1.0)
    for node in (plain, checked):
        await ask(node, [doc(200, 1), tokens(6)], SamplingParams(max_tokens=1), LINKED)
        await ask(node, BEGINS, GREEDY, LINKED)
    await eventually(lambda: sum(outcomes(checked).values()) == 2, "a check is under way")
    assert len(resident(plain)[ChunkKind.LOCAL]) == 2
    assert resident(checked) == resident(plain)


async def test_a_check_that_may_evict_runs_where_memory_is_full_of_cached_text(world: World) -> None:
    """The twin of the law above: the same requests, and the oldest document goes for the check."""
    node = await world.decode(num_blocks=24, shadow_share=1.0, shadow_evict=True)
    await ask(node, [doc(200, 1), tokens(6)], SamplingParams(max_tokens=1), LINKED)
    await ended(node, no_room=1)  # too long to be computed twice
    await ask(node, BEGINS, GREEDY, LINKED)
    await ended(node, no_room=1, done=1)
    assert len(resident(node)[ChunkKind.LOCAL]) == 1
    node.engine.pool.check_invariants()


async def test_a_check_that_finds_too_little_free_when_it_runs_evicts_nothing(world: World) -> None:
    node = await world.decode(num_blocks=24, shadow_share=1.0)
    core, document = node.engine, tokens(190, 8)
    async with somebody_here(node):
        await ask(node, BEGINS, GREEDY, LINKED)
        run = await node.thread.run(lambda: core.compile(b"cached", document))
        core.pool.release(run.extent)
        assert 0 < core.pool.counts()[BlockState.FREE] < 6 < core.pool.available_blocks
    await ended(node, no_room=1)
    assert b"cached" in core.resident


async def test_a_check_leaves_what_it_read_as_long_unused_as_it_found_it(world: World) -> None:
    plain, checked = await world.decode(num_blocks=40), await world.decode(num_blocks=40, shadow_share=1.0)
    for node in (plain, checked):
        async with somebody_here(node):
            await ask(node, BEGINS, GREEDY, LINKED)
            await ask(node, [tokens(150, 5)], GREEDY)
    await ended(checked, done=1)
    for node in (plain, checked):
        await ask(node, [tokens(410, 6)], GREEDY)
    assert not resident(plain)[ChunkKind.LOCAL], "choose other sizes: the document need not go"
    assert resident(checked) == resident(plain)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("num_blocks", [30, 48])
async def test_what_is_resident_after_requests_is_what_it_is_without_checks(
    world: World, seed: int, num_blocks: int
) -> None:
    """Whether a check has ended, waits or runs when the next request comes."""
    plain = await world.decode(num_blocks=num_blocks, min_reused_tokens=1)
    checked = await world.decode(
        num_blocks=num_blocks, min_reused_tokens=1, shadow_share=1.0, shadow_slice_tokens=16, shadow_queue=3
    )
    draw = random.Random(seed)
    for index in range(25):
        parts = [tokens(draw.randint(1, 9), index), *(doc(40 + 9 * i, i) for i in draw.choices(range(8), k=2)), [1]]
        mode = draw.choice([LINKED, LINKED, ReuseMode.EXACT])
        params = SamplingParams(max_tokens=draw.randint(1, 20))
        if mode is ReuseMode.EXACT:
            parts = [tokens(150, draw.randint(0, 2)), tokens(draw.randint(1, 20), index)]
        for node in (plain, checked):
            await ask(node, parts, params, mode, request_id=f"{index}")
            await eventually(lambda n=node: n.admission.is_idle, "a request has not gone")  # type: ignore[misc]  # mypy cannot infer a lambda's default
        if draw.random() < 0.5:
            await eventually(lambda: not figure(checked, "held_bytes"), "checks hold memory")
        assert resident(checked) == resident(plain), index
        checked.engine.pool.check_invariants()
    assert num_blocks == 30 or outcomes(checked).get("done", 0) > 0


async def test_an_answer_counts_twice_towards_the_room_a_check_needs(world: World) -> None:
    """28 blocks: the request leaves 14 free; its prompt takes 6, its answer 7 exactly and 7 linked."""
    node = await world.decode(num_blocks=28, shadow_share=1.0)
    async with somebody_here(node):
        await ask(node, BEGINS, SamplingParams(max_tokens=100), LINKED)
        assert outcomes(node) == {"no_room": 1}


async def test_a_request_that_names_a_document_twice_is_checked_and_holds_it_as_often_as_it_says(world: World) -> None:
    node = await world.decode(shadow_share=1.0)
    await ask(node, [tokens(2), doc(70, 1), tokens(3), doc(70, 1), tokens(4)], GREEDY, LINKED)
    await ended(node, done=1)
    assert is_idle(node.engine.pool)
    node.engine.pool.check_invariants()


async def test_a_shared_context_says_of_itself_what_the_context_does(world: World) -> None:
    pool = (await world.decode()).engine.pool
    context = Context(pool, [], [pool.allocate(5)], torch.ones(3), 5, behind_sinks=True)
    again = context.shared()
    context.close()
    assert (again.behind_sinks, again.is_exact, again.num_computed_tokens) == (True, False, 5)
    assert again.last_hidden is context.last_hidden
    assert not again.closed
    again.close()


async def test_a_check_without_room_to_run_is_dropped(world: World) -> None:
    node = await world.decode(num_blocks=24, shadow_share=1.0)
    async with somebody_here(node):
        await ask(node, BEGINS, GREEDY, LINKED, request_id="when it ends")
        extent = node.engine.pool.allocate(200)
        await ask(node, BEGINS, GREEDY, LINKED, request_id="at once")
        assert outcomes(node) == {"no_room": 1}
    await ended(node, no_room=2)
    node.engine.pool.release(extent)


# Failures and ends


@pytest.mark.parametrize("pass_number", [1, 2, 6, 7], ids=["first", "prefill", "answer, exact", "answer, linked"])
async def test_a_check_that_fails_is_counted_and_hurts_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch, pass_number: int
) -> None:
    node = await world.decode(shadow_share=1.0, shadow_slice_tokens=20)
    advance, forward, num_passes = ShadowComparison.advance, node.engine.adapter.forward_steps, 0
    in_check = False

    def advanced(self: ShadowComparison) -> Any:
        nonlocal in_check
        in_check = True
        try:
            return advance(self)
        finally:
            in_check = False

    def fails_once(*args: Any) -> Any:
        nonlocal num_passes
        num_passes += in_check
        if in_check and num_passes == pass_number:
            raise RuntimeError("planted")
        return forward(*args)

    monkeypatch.setattr(ShadowComparison, "advance", advanced)
    monkeypatch.setattr(node.engine.adapter, "forward_steps", fails_once)
    await ask(node, BEGINS, GREEDY, LINKED)
    await ended(node, failed=1)
    assert is_idle(node.engine.pool)
    assert_same(await ask(node, BEGINS, GREEDY, LINKED), world.expect(BEGINS, GREEDY, LINKED))
    await ended(node, failed=1, done=1)
    assert node.server.health.is_serving()


async def test_a_drain_waits_for_no_check_and_leaves_nothing_held(world: World) -> None:
    node = await world.decode(shadow_share=1.0)
    async with somebody_here(node):
        for index in range(3):
            await ask(node, BEGINS, GREEDY, LINKED, request_id=f"{index}")
        assert figure(node, "waiting") == 3
        assert await node.server.drain()
        await ended(node, shutdown=3)
    assert is_idle(node.engine.pool)


async def test_a_node_that_ends_in_the_middle_of_a_check_leaves_nothing_held(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await world.decode(shadow_share=1.0, shadow_slice_tokens=16)
    with held_slice(monkeypatch, 4) as (began, gate):
        async with somebody_here(node):  # or the first answer's check could hold the second's engine
            for index in range(2):
                await ask(node, BEGINS, GREEDY, LINKED, request_id=f"{index}")
        await asyncio.to_thread(began.wait, WAIT_S)
        killing = asyncio.ensure_future(world.kill(node))
        await asyncio.sleep(0.05)
        gate.set()
        await killing
    assert is_idle(node.engine.pool)
    node.engine.pool.check_invariants()
    assert outcomes(node) == {"shutdown": 2}


async def test_the_ledger_is_clean_after_a_storm_of_requests_cancels_and_checks(world: World) -> None:
    """The world checks at its end that nothing is held."""
    await world.store()
    await world.prefill()
    node = await world.decode(num_blocks=60, shadow_share=0.7, shadow_slice_tokens=32, shadow_queue=4)

    async def one(index: int) -> None:
        parts = [tokens(3, index), doc(60 + index, index % 5), doc(40, index % 3), tokens(5, index)]
        mode = ReuseMode.EXACT if index % 4 == 0 else LINKED
        request = generate_request(node, parts, SamplingParams(max_tokens=5 + index), mode, request_id=f"{index}")
        await asyncio.sleep(0.01 * index)
        with suppress(Busy):
            if index % 5 == 2:
                async with calling(node, request) as call:
                    await call.read()
            else:
                await send(node, request)

    for _ in range(2):
        await asyncio.gather(*(one(index) for index in range(30)))
        await eventually(lambda: is_idle(node.engine.pool), "checks hold memory")
        node.engine.pool.check_invariants()
    for chunk_id in set().union(*resident(node).values()):
        node.engine.resident.drop(chunk_id)  # checks need free memory, and the cache has taken it all
    await ask(node, BEGINS, GREEDY, LINKED, request_id=next(f"{i}" for i in range(99) if is_chosen(f"{i}", 0.7)))
    await eventually(lambda: outcomes(node).get("done", 0) > 0, "no check is done")
    assert "failed" not in outcomes(node)
