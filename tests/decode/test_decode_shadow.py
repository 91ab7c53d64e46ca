"""Shadow checks on a node: what they find, and that requests come first in time and in memory."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import pytest
import torch
from tiny_cluster import (
    WAIT_S,
    Doc,
    World,
    ask,
    assert_same,
    calling,
    count_calls,
    doc,
    eventually,
    generate_request,
    ids_of,
    is_idle,
    prompt_of,
    resume,
    send,
    tokens,
)

from spolia_core.errors import Busy
from spolia_core.reuse import ChunkKind, ReuseMode
from spolia_core.sampling import SamplingParams
from spolia_decode.node import DecodeNode
from spolia_decode.shadow import is_chosen
from spolia_decode.shadow_check import ShadowComparison, shared
from spolia_decode.shadow_metrics import Outcome
from spolia_engine.context import Context
from spolia_engine.pool import BlockState
from spolia_node.deadline import Deadline
from spolia_worker.record import model_name

LINKED = ReuseMode.LINKED
GREEDY = SamplingParams(max_tokens=12)
PARTS = [tokens(2), doc(70, 1), doc(40, 2), tokens(4, 9), doc(150, 3), tokens(11, 3)]
BEGINS = [doc(90, 4), tokens(6, 2)]
"""Reused as it was computed: the model has no BOS, so the document stands at position 0, and LINKED is exact."""


def figure(node: DecodeNode, name: str, **labels: str) -> float:
    labels = {"model": model_name(node.config), "profile": node.terms.profile, **labels}
    return node.server.metrics.value(f"spolia_shadow_{name}", **labels)


def outcomes(node: DecodeNode) -> dict[str, int]:
    """Checks by what became of them, those with none left out."""
    found = {outcome.value: int(figure(node, "checks_total", outcome=outcome.value)) for outcome in Outcome}
    return {name: count for name, count in found.items() if count}


async def ended(node: DecodeNode, **expected: int) -> None:
    """Returns once checks have ended so."""
    await eventually(lambda: outcomes(node) == expected, f"not {expected}")


def mean_kl(node: DecodeNode) -> float:
    return figure(node, "kl_nats_sum") / figure(node, "kl_nats_count")


@asynccontextmanager
async def somebody_here(node: DecodeNode) -> AsyncIterator[None]:
    """A request that has its place and no work: nothing is checked meanwhile."""
    async with node.admission.place(Deadline.after(WAIT_S)):
        yield


@contextmanager
def held_slice(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[tuple[threading.Event, threading.Event]]:
    """(set when slice `number` of a check has begun, what it waits for to go on)."""
    began, gate, count = threading.Event(), threading.Event(), 0
    advance = ShadowComparison.advance

    def held(self: ShadowComparison) -> Any:
        nonlocal count
        count += 1
        if count == number:
            began.set()
            assert gate.wait(WAIT_S)
        return advance(self)

    monkeypatch.setattr(ShadowComparison, "advance", held)
    try:
        yield began, gate
    finally:
        gate.set()


# What they find


async def test_off_is_the_default_and_costs_nothing(world: World) -> None:
    node = await world.decode()
    assert node.shadow is None
    await ask(node, PARTS, GREEDY, LINKED)
    assert not [metric.name for metric in node.server.metrics.registry.collect() if "shadow" in metric.name]


@pytest.mark.parametrize("slice_tokens", [20, 64, 1000])
async def test_where_every_token_is_recomputed_nothing_diverges(world: World, slice_tokens: int) -> None:
    node = await world.decode(shadow_share=1.0, link_tokens=200, shadow_slice_tokens=slice_tokens)
    answer = await ask(node, PARTS, GREEDY, LINKED)
    await ended(node, done=1)
    assert figure(node, "tokens_total") == figure(node, "kl_nats_count") == len(answer.token_ids) == 12
    assert figure(node, "agreed_tokens_total") == 12
    assert mean_kl(node) < 1e-6
    assert figure(node, "seconds_total") > 0


async def test_a_linked_answer_diverges_by_what_a_slow_comparison_finds(world: World) -> None:
    """Token by token, over contexts built by the engine's own link pass and prefill."""
    node = await world.decode(shadow_share=1.0, link_tokens=4, min_reused_tokens=1)
    answer = await ask(node, PARTS, GREEDY, LINKED)
    await ended(node, done=1)
    logits = {mode: slow_logits(world, answer.token_ids, mode) for mode in ReuseMode}
    exact, linked = (torch.log_softmax(logits[mode].double(), -1) for mode in (ReuseMode.EXACT, LINKED))
    expected = (exact.exp() * (exact - linked)).sum(-1)
    assert figure(node, "kl_nats_sum") == pytest.approx(float(expected.sum()), rel=1e-3)
    assert float(expected.mean()) > 1e-3, "choose another prompt: there is nothing to find"
    agreed = (exact.argmax(-1) == linked.argmax(-1)).sum()
    assert figure(node, "agreed_tokens_total") == int(agreed)
    rows = torch.arange(12), torch.tensor(answer.token_ids)
    assert figure(node, "exact_nll_nats_total") == pytest.approx(-float(exact[rows].sum()), rel=1e-3)
    assert figure(node, "linked_nll_nats_total") == pytest.approx(-float(linked[rows].sum()), rel=1e-3)


def slow_logits(world: World, answer: list[int], mode: ReuseMode) -> torch.Tensor:
    """What predicts each answer token, each from a context computed for it alone."""
    rows = []
    for length in range(len(answer)):
        engine = world.oracle()
        parts = [*PARTS, answer[:length]] if length else PARTS
        prompt = prompt_of(parts, engine.ids)
        params = SamplingParams(max_tokens=1)
        found: list[torch.Tensor] = []
        adapter_logits = engine.adapter.logits
        # Spied on; a lambda is no method, which the type checker minds.
        engine.adapter.logits = lambda hidden, f=found, a=adapter_logits: f.append(a(hidden)) or f[-1]  # type: ignore[func-returns-value, method-assign]  # a lambda that answers what it keeps
        engine.generate(prompt, params, mode=mode, num_link_tokens=4, min_reused_tokens=1)
        rows.append(found[0][-1])
    return torch.stack(rows)


@pytest.mark.parametrize("plant", ["damaged values", "other text"])
async def test_a_planted_divergence_is_reported_and_its_absence_is(world: World, plant: str) -> None:
    sound, planted = await world.decode(shadow_share=1.0), await world.decode(shadow_share=1.0, shadow_max_kl=0.05)
    document = BEGINS[0]
    assert isinstance(document, Doc)
    plant_divergence(planted, document, plant)
    for node in (sound, planted):
        for index in range(5):
            await ask(node, [document, tokens(6, index)], GREEDY, LINKED, request_id=f"{index}")
        await ended(node, done=5)
    assert mean_kl(sound) < 1e-6
    assert figure(sound, "agreed_tokens_total") == figure(sound, "tokens_total") == 60
    assert mean_kl(planted) > 0.05
    assert figure(planted, "recent_kl_nats") == pytest.approx(mean_kl(planted))
    assert figure(planted, "agreed_tokens_total") < figure(planted, "tokens_total") == 60


def plant_divergence(node: DecodeNode, document: Doc, plant: str) -> None:
    """Makes a resident chunk something else than its id says."""
    core, chunk_id = node.engine, ids_of(node.engine).local(document.token_ids)
    text = tokens(len(document.token_ids), 77) if plant == "other text" else document.token_ids
    run = core.compile(chunk_id, text)
    if plant == "damaged values":
        run.extent.value.neg_()
    core.pool.release(run.extent)
    assert chunk_id in core.resident


async def test_a_check_compares_what_this_node_generated_of_a_resumed_answer(world: World) -> None:
    node = await world.decode(shadow_share=1.0)
    request = generate_request(node, BEGINS, GREEDY, LINKED)
    whole = await send(node, request)
    await resume(node, request, whole.token_ids[:5])
    await ended(node, done=2)
    assert figure(node, "tokens_total") == 12 + 7
    assert mean_kl(node) < 1e-6


async def test_an_answer_of_one_token_is_checked(world: World) -> None:
    node = await world.decode(shadow_share=1.0)
    await ask(node, BEGINS, SamplingParams(max_tokens=1), LINKED)
    await ended(node, done=1)
    assert figure(node, "tokens_total") == figure(node, "agreed_tokens_total") == 1


# Who is checked


async def test_the_share_is_obeyed_and_names_the_same_requests_again(world: World) -> None:
    node = await world.decode(shadow_share=0.4, shadow_queue=100)
    ids = [f"request-{i}" for i in range(30)]
    num_chosen = sum(is_chosen(i, 0.4) for i in ids)
    assert 0 < num_chosen < 30
    for times in (1, 2):
        await asyncio.gather(*(ask(node, BEGINS, SamplingParams(max_tokens=2), LINKED, request_id=i) for i in ids))
        await ended(node, done=times * num_chosen)


async def test_exact_and_cancelled_requests_are_not_checked(world: World) -> None:
    node = await world.decode(shadow_share=1.0)
    await ask(node, [tokens(60)], GREEDY)
    async with calling(node, generate_request(node, BEGINS, SamplingParams(max_tokens=1200), LINKED)) as call:
        await call.read()
    await eventually(lambda: node.batch.num_sequences == 0, "the sequence is not closed")
    await ask(node, BEGINS, GREEDY, LINKED)
    await ended(node, done=1)
    assert figure(node, "tokens_total") == 12


async def test_what_is_too_long_is_not_checked_and_counted(world: World) -> None:
    node = await world.decode(shadow_share=1.0, shadow_max_tokens=107)
    await ask(node, BEGINS, GREEDY, LINKED)  # 96 + 12
    await ask(node, BEGINS, SamplingParams(max_tokens=11), LINKED)
    await ended(node, done=1, too_long=1)


# Requests come first in time


async def test_the_queue_is_bounded_and_drops_are_counted(world: World) -> None:
    node = await world.decode(shadow_share=1.0, shadow_queue=3)
    async with somebody_here(node):
        for index in range(8):
            await ask(node, BEGINS, GREEDY, LINKED, request_id=f"{index}")
        assert outcomes(node) == {"queue_full": 5}
        assert figure(node, "waiting") == 3
        pool = node.engine.pool
        assert figure(node, "held_bytes") == pool.counts()[BlockState.REFERENCED] * pool.block_size * (
            pool.shape.bytes_per_token
        )
    await ended(node, done=3, queue_full=5)
    assert figure(node, "waiting") == figure(node, "held_bytes") == 0


async def test_nothing_is_checked_while_a_request_is_here(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await world.decode(shadow_share=1.0)
    forks = count_calls(monkeypatch, node.engine, "fork")
    async with somebody_here(node):
        await ask(node, BEGINS, GREEDY, LINKED)
        await ask(node, [tokens(40)], GREEDY)
        node.thread.notify()
        await node.thread.run(lambda: None)
        assert not forks
        assert figure(node, "waiting") == 1
    await ended(node, done=1)
    assert forks


async def test_a_request_waits_for_the_slice_under_way_and_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of what the engine's thread does, from the request's arrival to its end."""
    node = await world.decode(shadow_share=1.0, shadow_slice_tokens=8)
    events: list[str] = []
    for name in ("compile_steps", "linked_context_steps", "step_logits"):
        record_calls(monkeypatch, node.engine, name, events, "request")
    with held_slice(monkeypatch, 3) as (began, gate):
        record_calls(monkeypatch, ShadowComparison, "advance", events, "slice")
        await ask(node, BEGINS, GREEDY, LINKED, request_id="first")
        await asyncio.to_thread(began.wait, WAIT_S)
        assert events[-3:] == ["slice"] * 3
        del events[:]
        asking = asyncio.ensure_future(ask(node, PARTS, GREEDY, LINKED, request_id="second"))
        await eventually(lambda: not node.admission.is_idle, "the request has not arrived")
        gate.set()
        await asking
    await ended(node, done=2)
    assert events.count("request") == 3 + 1 + 11
    assert "slice" not in events[: events.index("request") + 15], events
    assert events[15:] == ["slice"] * (len(events) - 15)


def record_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, events: list[str], event: str) -> None:
    original = getattr(owner, name)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        events.append(event)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, recorded)


@pytest.mark.parametrize("slice_tokens", [10, 64])
async def test_a_slice_runs_no_more_rows_than_it_may(
    world: World, monkeypatch: pytest.MonkeyPatch, slice_tokens: int
) -> None:
    node = await world.decode(shadow_share=1.0, shadow_slice_tokens=slice_tokens)
    slices: list[int] = []
    advance, forward = ShadowComparison.advance, node.engine.adapter.forward_steps

    def advanced(self: ShadowComparison) -> Any:
        slices.append(0)
        return advance(self)

    def counted(token_ids: Any, *args: Any) -> Any:
        if slices:
            slices[-1] += len(token_ids)
        return forward(token_ids, *args)

    monkeypatch.setattr(ShadowComparison, "advance", advanced)
    monkeypatch.setattr(node.engine.adapter, "forward_steps", counted)
    await ask(node, BEGINS, GREEDY, LINKED)
    await ended(node, done=1)
    assert max(slices) <= slice_tokens
    assert sum(slices) == 96 + 2 * 11, (
        "every token is run once exactly, and the answer once more over the linked context"
    )


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
    again = shared(context)
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
