"""Shadow checks on a node: what they find, and that requests come first in time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from shadow_worlds import BEGINS, GREEDY, LINKED, PARTS, ended, figure, held_slice, mean_kl, outcomes, somebody_here
from tiny_answers import ask, calling, generate_request, resume, send
from tiny_cluster import WAIT_S, Doc, World, count_calls, eventually, ids_of, prompt_of, record_calls, tokens

from spolia_core.reuse import ReuseMode
from spolia_core.sampling import SamplingParams
from spolia_decode.node import DecodeNode
from spolia_decode.shadow import is_chosen
from spolia_decode.shadow_check import ShadowComparison
from spolia_engine.extent import BlockState

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
    for name in ("compile_steps", "linked_context_steps"):
        record_calls(monkeypatch, node.engine, name, events, "request")
    record_calls(monkeypatch, node.engine.decoding, "step_logits", events, "request")
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
