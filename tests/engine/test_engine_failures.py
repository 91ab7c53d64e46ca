"""What is refused, what breaks and what finds the pool full: everything is given back, and answers stay right."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from answer_worlds import check_answer, documents, greedy, live
from engine_worlds import (
    MAX_CONTEXT,
    assert_nothing_held,
    engine_of,
    only_in_extents,
    oracle_logits,
    oracle_of,
    tokens,
)

from spolia_core.errors import Busy, InvalidRequest
from spolia_core.prompt import Part, Prompt
from spolia_core.reuse import ChunkKind, ReuseMode
from spolia_core.sampling import SamplingParams
from spolia_engine.attention import ContextAttention
from spolia_engine.context import whole
from spolia_engine.decode_attention import DecodeAttention
from spolia_engine.passes import PassOptions
from spolia_engine.run import Run
from spolia_engine.sequence_starts import start_sequence
from spolia_engine.steps import finish

pytestmark = pytest.mark.usefixtures("place")

# Refusals


@pytest.mark.parametrize(
    ("prompt", "params", "field", "numbers"),
    [
        (Prompt(()), None, "parts", []),
        (Prompt.live([]), None, "parts[0].token_ids", []),
        (Prompt((Part((1,)), Part(()))), None, "parts[1].token_ids", []),
        (Prompt.live([1, 97]), None, "parts[0].token_ids", ["97", "96"]),
        (Prompt.live([-1]), None, "parts[0].token_ids", ["-1"]),
        (Prompt.live([1] * MAX_CONTEXT), None, "parts", [str(MAX_CONTEXT)]),
        (Prompt.live([1] * 5000), None, "parts", ["5000", str(MAX_CONTEXT)]),
        (Prompt.live([1] * 600), greedy(MAX_CONTEXT - 599), "sampling.max_tokens", ["600", "4009", str(MAX_CONTEXT)]),
        (Prompt.live([1]), greedy(0), "sampling.max_tokens", ["0"]),
        (Prompt.live([1]), greedy(1, temperature=-1.0), "sampling.temperature", ["-1.0"]),
        (Prompt.live([1]), greedy(1, temperature=float("nan")), "sampling.temperature", ["nan"]),
        (Prompt.live([1]), greedy(1, top_p=0.0), "sampling.top_p", ["0.0"]),
        (Prompt.live([1]), greedy(1, top_p=1.5), "sampling.top_p", ["1.5"]),
        (Prompt.live([1]), greedy(1, top_k=-1), "sampling.top_k", ["-1"]),
        (Prompt.live([1]), greedy(1, seed=-1), "sampling.seed", ["-1"]),
        (Prompt.live([1]), greedy(1, seed=2**64), "sampling.seed", []),
        (Prompt.live([1]), greedy(1, stop=("",)), "sampling.stop", ["256"]),
        (Prompt.live([1]), greedy(1, stop=("x",) * 17), "sampling.stop", ["17"]),
    ],
)
def test_bad_input_is_refused_by_field_before_memory_is_held(
    monkeypatch: pytest.MonkeyPatch, prompt: Prompt, params: SamplingParams | None, field: str, numbers: list[str]
) -> None:
    engine = engine_of()
    monkeypatch.setattr(engine.pool, "allocate", _must_not_be_called)
    for mode in ReuseMode:
        with pytest.raises(InvalidRequest) as caught:
            engine.generate(prompt, params, mode=mode)
        assert caught.value.field == field
        assert all(number in caught.value.message for number in numbers), caught.value.message


def _must_not_be_called(*_: object, **__: object) -> None:
    raise AssertionError("memory was taken for a request that cannot be served")


def test_a_chunk_id_of_other_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    monkeypatch.setattr(engine.pool, "allocate", _must_not_be_called)
    wrong = Part(tuple(tokens(5, 1)), engine.ids.local(tokens(5, 2)))
    with pytest.raises(InvalidRequest) as caught:
        engine.generate(Prompt((live(1, 3), wrong, live(1, 4))), mode=ReuseMode.LINKED)
    assert caught.value.field == "parts[1].chunk_id"
    with pytest.raises(InvalidRequest, match="num_link_tokens"):
        engine.generate(documents(engine), mode=ReuseMode.LINKED, num_link_tokens=-1)


# Failures give everything back


class Broken(Exception):
    pass


@pytest.mark.parametrize("mode", list(ReuseMode))
@pytest.mark.parametrize(("attention", "at_call"), [(ContextAttention, 0), (ContextAttention, 1), (DecodeAttention, 3)])
def test_a_pass_that_breaks_in_the_middle_leaks_nothing(
    monkeypatch: pytest.MonkeyPatch, mode: ReuseMode, attention: type, at_call: int
) -> None:
    engine = engine_of()
    if attention is DecodeAttention and engine.decoding.device is not None:
        pytest.skip("a captured step runs no Python that could break")
    prompt = documents(engine)
    engine.generate(prompt, greedy(2))  # something to reuse
    calls = iter(range(1000))
    original = attention.__call__

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == at_call:
            raise Broken
        return original(self, *args, **kwargs)

    expected = engine_of().generate(prompt, greedy(5), mode=mode).token_ids
    monkeypatch.setattr(attention, "__call__", broken)
    with pytest.raises(Broken):
        engine.generate(prompt, greedy(5), mode=mode)
    assert_nothing_held(engine)
    monkeypatch.undo()
    assert engine.generate(prompt, greedy(5), mode=mode).token_ids == expected
    assert_nothing_held(engine)


def test_a_listener_that_raises_leaks_nothing() -> None:
    engine, ids = engine_of(), tokens(300)
    engine.generate(Prompt.live(ids), greedy(1))
    seen: list[tuple[int, int]] = []

    def on_layer(run: Run, layer: int) -> None:
        seen.append((run.num_tokens, layer))
        if layer == 1:
            raise Broken

    prefix = engine.acquire_prefix(list(engine.ids.prefix_chain(ids)))
    with pytest.raises(Broken):
        finish(engine.exact_context_steps(ids, prefix, PassOptions(on_layer=on_layer)))
    assert seen == [(300 - 256, 0), (300 - 256, 1)]
    prompt = documents(engine)
    runs = {i: engine.compile(b"%d" % i, prompt.parts[i].token_ids) for i in (1, 4)}
    with pytest.raises(Broken):
        finish(engine.linked_context_steps(prompt, runs, options=PassOptions(on_layer=on_layer)))
    runs = {1: engine.compile(b"1", prompt.parts[1].token_ids)}
    with pytest.raises(KeyError):  # the run of part 4 is missing
        engine.linked_context(prompt, runs)
    assert_nothing_held(engine)


@only_in_extents
def test_a_step_that_breaks_can_be_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, ids = engine_of(), tokens(40)
    sequence = start_sequence(engine.exact_context(ids, []), engine.generation(greedy(4)))
    sequence.generation.accept(7)
    original = DecodeAttention.__call__

    def broken(self: Any, layer: int, *args: Any) -> Any:
        if layer == 1:
            raise Broken
        return original(self, layer, *args)

    monkeypatch.setattr(DecodeAttention, "__call__", broken)
    with pytest.raises(Broken):
        engine.decoding.step_logits([sequence])
    monkeypatch.undo()
    got = engine.decoding.step_logits([sequence])[0]
    torch.testing.assert_close(got, oracle_logits(oracle_of("llama"), [*ids, 7])[-1], atol=1e-4, rtol=0)
    engine.decoding.forget_plan()
    sequence.close()
    sequence.close()
    assert_nothing_held(engine)


# A full pool


@pytest.mark.parametrize("mode", list(ReuseMode))
@pytest.mark.parametrize("num_blocks", [1, 9, 10, 12, 19, 20, 21, 22, 29, 30, 32])
def test_a_pool_of_any_size_answers_right_or_not_at_all_and_leaks_nothing(mode: ReuseMode, num_blocks: int) -> None:
    engine = engine_of(num_blocks=num_blocks)
    prompt, params = documents(engine), greedy(32)
    expected = engine_of().generate(prompt, params, mode=mode).token_ids
    with suppress(Busy):
        assert engine.generate(prompt, params, mode=mode).token_ids == expected
        assert num_blocks >= 10
    assert_nothing_held(engine)


def test_busy_really_happens_and_room_helps() -> None:
    engine, params = engine_of(num_blocks=4), greedy(16)
    with pytest.raises(Busy, match="4 blocks available, 7 are needed") as caught:
        engine.generate(Prompt.live(tokens(100)), params)
    assert caught.value.retry_after_ms == 0
    assert len(engine.generate(Prompt.live(tokens(48)), params).token_ids) == 16


def test_eviction_under_pressure_keeps_answers_right() -> None:
    engine = engine_of(num_blocks=32)
    prompts = [tokens(160, seed) for seed in range(4)]
    evicted = 0
    for turn in range(3):
        for ids in prompts:
            before = len(engine.resident.held(ChunkKind.PREFIX))
            check_answer(engine, ids, 10)
            evicted += len(engine.resident.held(ChunkKind.PREFIX)) <= before
        assert len(engine.resident.held(ChunkKind.PREFIX)) > 0, turn
    assert evicted, "the pool was never full"


def test_linked_under_pressure_keeps_answers_right() -> None:
    tight, roomy = engine_of(num_blocks=34), engine_of()
    parts = [tight.chunk(tokens(100, seed)) for seed in range(6)]
    for first in range(6):
        prompt = Prompt((live(2, 9), parts[first], parts[(first + 1) % 6], parts[(first + 3) % 6], live(2, 8)))
        got = tight.generate(prompt, greedy(6), mode=ReuseMode.LINKED).token_ids
        assert got == roomy.generate(prompt, greedy(6), mode=ReuseMode.LINKED).token_ids
        assert_nothing_held(tight)


def test_a_context_closed_twice_gives_back_once() -> None:
    engine = engine_of()
    context = engine.exact_context(tokens(10), [])
    assert [span.first_position for span in context.spans] == [0]
    assert whole(context.spans[0].run).end_position == 10
    context.close()
    context.close()
    assert_nothing_held(engine)
