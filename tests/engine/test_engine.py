"""The whole in one process: answers, reuse, reports, refusals, and a pool that is empty afterwards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from engine_worlds import (
    MAX_CONTEXT,
    adapter_of,
    assert_nothing_held,
    check_greedy,
    engine_of,
    full_blocks,
    letters,
    only_in_extents,
    oracle_greedy,
    oracle_logits,
    oracle_of,
    step,
    tokens,
)

from spolia_core.errors import Busy, InvalidRequest
from spolia_core.prompt import Part, Prompt
from spolia_core.reuse import PREFIX_CHUNK_TOKENS, ChunkKind, FinishReason, MissReason, ReuseMode, TokenSource
from spolia_core.sampling import DEFAULT_MAX_TOKENS, SamplingParams
from spolia_engine.attention import ContextAttention
from spolia_engine.context import Context, whole
from spolia_engine.decode_attention import DecodeAttention
from spolia_engine.engine import Engine
from spolia_engine.extent import BlockState
from spolia_engine.kv_bytes import layer_of_run, write_layer
from spolia_engine.passes import PassOptions
from spolia_engine.run import Run
from spolia_engine.sealing import prefix_blocks
from spolia_engine.steps import finish

pytestmark = pytest.mark.usefixtures("place")


def greedy(count: int, **changes: Any) -> SamplingParams:
    return SamplingParams(max_tokens=count, **changes)


def live(count: int, seed: int) -> Part:
    return Part(tuple(tokens(count, seed)))


def check_answer(engine: Engine, ids: list[int], count: int, name: str = "llama") -> list[int]:
    """An EXACT answer against transformers; returns its ids."""
    expected, margins = oracle_greedy(oracle_of(name), ids, count)
    answer = engine.generate(Prompt.live(ids), greedy(count))
    assert check_greedy(answer.token_ids, expected, margins) >= min(count, 8)
    assert_nothing_held(engine)
    return list(answer.token_ids)


# EXACT


@pytest.mark.parametrize("num_tokens", [1, 2, 127, 128, 129, 256, 300])
def test_cold_warm_and_transformers_agree(num_tokens: int) -> None:
    engine, prompt = engine_of("qwen3"), Prompt.live(tokens(num_tokens))
    expected, margins = oracle_greedy(oracle_of("qwen3"), prompt.token_ids, 20)
    cold = engine.generate(prompt, greedy(20))
    warm = engine.generate(prompt, greedy(20))
    for answer in (cold, warm):
        check_greedy(answer.token_ids, expected, margins)
        assert answer.reuse.num_prompt_tokens == num_tokens
        assert answer.finish_reason is FinishReason.LENGTH
        assert answer.text == letters(answer.token_ids)
        assert len(answer.margins) == 20
    assert cold.reuse.sources[TokenSource.DEVICE] == 0
    # At least one token is computed, else there were no logits to draw from.
    assert warm.reuse.sources[TokenSource.DEVICE] == full_blocks(num_tokens - 1)
    assert_nothing_held(engine)


@pytest.mark.parametrize(
    ("num_prompt", "num_answer"), [(200, 70), (128, 129), (250, 20), (256, 257), (90, 300), (5, 20)]
)
def test_the_second_turn_of_a_chat_reuses_the_first_answer(num_prompt: int, num_answer: int) -> None:
    engine, first = engine_of(), tokens(num_prompt)
    answer = check_answer(engine, first, num_answer)
    second = [*first, *answer, *tokens(11, seed=5)]
    expected, margins = oracle_greedy(oracle_of("llama"), second, 12)
    result = engine.generate(Prompt.live(second), greedy(12))
    check_greedy(result.token_ids, expected, margins)
    # The last token of an answer has no KV yet.
    assert result.reuse.sources[TokenSource.DEVICE] == full_blocks(num_prompt + num_answer - 1)
    assert_nothing_held(engine)


@pytest.mark.parametrize("num_answer", [127, 128, 129, 130])
def test_sealed_kv_is_the_kv_of_its_tokens(num_answer: int) -> None:
    engine, first = engine_of("llama-yarn"), tokens(60)
    answer = engine.generate(Prompt.live(first), greedy(num_answer)).token_ids
    ids = [*first, *answer]
    chain = list(engine.ids.prefix_chain(ids[:-1]))
    assert len(chain) == len(engine.resident.held(ChunkKind.PREFIX)) == (num_answer + 59) // PREFIX_CHUNK_TOKENS
    fresh = engine.exact_context(ids, [])
    for index, run in enumerate(engine.acquire_prefix(chain)):
        start = index * PREFIX_CHUNK_TOKENS
        assert (run.num_tokens, run.rope_base) == (PREFIX_CHUNK_TOKENS, start)
        for mine, its in (
            (run.extent.key, fresh.spans[0].run.extent.key),
            (run.extent.value, fresh.spans[0].run.extent.value),
        ):
            stored = mine[:, :, run.start : run.start + run.num_tokens]
            torch.testing.assert_close(stored, its[:, :, start : start + PREFIX_CHUNK_TOKENS], atol=2e-5, rtol=1e-5)
        engine.pool.release(run.extent)
    fresh.close()
    assert_nothing_held(engine)


def test_sealing_again_takes_no_memory() -> None:
    engine, prompt = engine_of(), Prompt.live(tokens(100))
    engine.generate(prompt, greedy(200))
    before = engine.pool.counts()[BlockState.CACHED]
    engine.generate(prompt, greedy(200))
    assert engine.pool.counts()[BlockState.CACHED] == before
    engine.generate(prompt, greedy(300))  # one block more: only that is added
    assert engine.pool.counts()[BlockState.CACHED] == before + PREFIX_CHUNK_TOKENS // engine.pool.block_size


def test_sealing_gives_way_when_the_pool_is_full() -> None:
    engine = engine_of(num_blocks=8 + 13)  # 128 prompt tokens and the tail; no room for a sealed block
    answer = engine.generate(Prompt.live(tokens(120)), greedy(200))
    assert len(answer.token_ids) == 200
    assert engine.resident.held(ChunkKind.PREFIX) == []
    assert_nothing_held(engine)


def test_an_arrived_context_goes_on_where_the_other_node_stopped() -> None:
    there, here, ids = engine_of(), engine_of(), tokens(150)
    sent = there.exact_context(ids, [])
    source = sent.spans[0].run
    extent = here.pool.allocate(150, in_transfer=True)
    for layer in range(there.adapter.num_layers):
        write_layer(extent, 0, layer, 150, *layer_of_run(source, layer))
    here.pool.arrive(extent)
    chain = list(here.ids.prefix_chain(ids))
    context = here.arrived_context([], Run(extent, 0, 150, 0))
    assert [chunk_id for chunk_id, _ in here.register_prefix(context, chain)] == chain
    generation = here.generation(greedy(120))
    generation.accept(there.first_token(sent, generation.params))
    sent.close()
    sequence = here.start(context, generation)
    while not sequence.finished:
        step(here, sequence)
    sealed = here.seal_answer(
        sequence, prefix_blocks(list(here.ids.prefix_chain([*ids, *generation.token_ids[:-1]])), len(ids) // 128)
    )
    assert len(sealed) == 1
    here.pool.release(sealed[0][1].extent)
    sequence.close()
    here.forget_plan()
    assert tuple(generation.token_ids) == engine_of().generate(Prompt.live(ids), greedy(120)).token_ids
    assert_nothing_held(here)
    assert_nothing_held(there)


def test_a_prefix_is_registered_once() -> None:
    engine, ids = engine_of(), tokens(400)
    chain = list(engine.ids.prefix_chain(ids))
    with_context(engine, ids, lambda context: _check_registered(engine, context, chain))


def with_context(engine: Engine, ids: list[int], use: Callable[[Context], None]) -> None:
    context = engine.exact_context(ids, [])
    use(context)
    context.close()
    assert_nothing_held(engine)


def _check_registered(engine: Engine, context: Context, chain: list[bytes]) -> None:
    found = engine.register_prefix(context, chain)
    assert [chunk_id for chunk_id, _ in found] == chain
    assert [(run.start, run.rope_base, run.num_tokens) for _, run in found] == [(n, n, 128) for n in (0, 128, 256)]
    assert engine.register_prefix(context, chain) == []


# LINKED


def documents(engine: Engine) -> Prompt:
    a, b = engine.chunk(tokens(150, 1)), engine.chunk(tokens(10, 2))
    return Prompt((live(3, 3), a, b, live(4, 4), a, live(5, 5)))


def test_linked_sources_add_up_and_say_what_was_compiled_and_what_was_there() -> None:
    engine = engine_of()
    prompt = documents(engine)
    cold = engine.generate(prompt, greedy(4), mode=ReuseMode.LINKED, num_link_tokens=16).reuse
    warm = engine.generate(prompt, greedy(4), mode=ReuseMode.LINKED, num_link_tokens=16).reuse
    for report in (cold, warm):
        assert report.num_prompt_tokens == prompt.num_tokens == 322
        assert report.sources[TokenSource.COMPUTED] == 12
        assert report.sources[TokenSource.LINK] == 16 + 10 + 16
        assert report.link_tokens_per_chunk == 16
        assert report.mode is ReuseMode.LINKED
    assert cold.sources[TokenSource.COMPILED] == cold.sources[TokenSource.DEVICE] == 134  # the second use is a hit
    assert [(m.chunk_id, m.reason, m.num_tokens) for m in cold.misses] == [
        (prompt.parts[1].chunk_id, MissReason.NOT_FOUND, 150)
    ]
    assert warm.sources[TokenSource.DEVICE] == 268 == warm.num_reused_tokens
    assert warm.misses == []
    assert_nothing_held(engine)


def test_linked_answers_are_the_same_cold_and_warm_and_elsewhere_in_the_batch() -> None:
    engine = engine_of()
    prompt = documents(engine)
    answers = {engine.generate(prompt, greedy(12), mode=ReuseMode.LINKED).token_ids for _ in range(3)}
    assert len(answers) == 1


def test_linked_with_all_of_every_chunk_recomputed_is_the_exact_answer() -> None:
    engine = engine_of("qwen2")
    prompt = documents(engine)
    expected, margins = oracle_greedy(oracle_of("qwen2"), prompt.token_ids, 12)
    linked = engine.generate(prompt, greedy(12), mode=ReuseMode.LINKED, num_link_tokens=150)
    check_greedy(linked.token_ids, expected, margins)
    assert linked.reuse.num_reused_tokens == 0
    assert engine.resident.held(ChunkKind.LOCAL) == []


def test_linked_kv_never_becomes_a_prefix_chunk() -> None:
    engine = engine_of()
    prompt = documents(engine)
    engine.generate(prompt, greedy(200), mode=ReuseMode.LINKED)
    assert engine.resident.held(ChunkKind.PREFIX) == []
    exact = engine.generate(prompt, greedy(4))
    assert exact.reuse.sources[TokenSource.DEVICE] == 0
    assert exact.reuse.sources[TokenSource.COMPUTED] == prompt.num_tokens


def test_a_moved_chunk_cannot_be_sealed() -> None:
    engine = engine_of()
    prompt = documents(engine)
    runs = {i: engine.compile(b"%d" % i, prompt.parts[i].token_ids) for i in (1, 4)}
    context = engine.linked_context(prompt, runs)
    sequence = engine.start(context, engine.generation(greedy(4)))
    chain = list(engine.ids.prefix_chain(prompt.token_ids))
    with pytest.raises(AssertionError, match="moved"):
        engine.seal_answer(sequence, prefix_blocks(chain))
    with pytest.raises(AssertionError, match="moved"):
        engine.register_prefix(context, chain)
    sequence.close()
    assert_nothing_held(engine)


def test_samples_of_one_prompt_share_one_copy_of_a_chunk() -> None:
    engine = engine_of()
    part = engine.chunk(tokens(320, 1))
    engine.generate(Prompt((live(3, 2), part, live(2, 3))), greedy(1), mode=ReuseMode.LINKED)
    before = engine.pool.counts()[BlockState.CACHED]
    engine.generate(Prompt((live(9, 4), part, live(2, 5), part, live(1, 6))), greedy(1), mode=ReuseMode.LINKED)
    assert engine.pool.counts()[BlockState.CACHED] == before == 320 // engine.pool.block_size


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


def test_a_default_answer_shrinks_to_what_the_context_leaves() -> None:
    engine = engine_of()
    assert len(engine.generate(Prompt.live([1] * (MAX_CONTEXT - 3))).token_ids) == 3
    assert len(engine.generate(Prompt.live([1])).token_ids) == DEFAULT_MAX_TOKENS


# Failures give everything back


class Broken(Exception):
    pass


@pytest.mark.parametrize("mode", list(ReuseMode))
@pytest.mark.parametrize(("attention", "at_call"), [(ContextAttention, 0), (ContextAttention, 1), (DecodeAttention, 3)])
def test_a_pass_that_breaks_in_the_middle_leaks_nothing(
    monkeypatch: pytest.MonkeyPatch, mode: ReuseMode, attention: type, at_call: int
) -> None:
    engine = engine_of()
    if attention is DecodeAttention and engine.device is not None:
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
    sequence = engine.start(engine.exact_context(ids, []), engine.generation(greedy(4)))
    sequence.generation.accept(7)
    original = DecodeAttention.__call__

    def broken(self: Any, layer: int, *args: Any) -> Any:
        if layer == 1:
            raise Broken
        return original(self, layer, *args)

    monkeypatch.setattr(DecodeAttention, "__call__", broken)
    with pytest.raises(Broken):
        engine.step_logits([sequence])
    monkeypatch.undo()
    got = engine.step_logits([sequence])[0]
    torch.testing.assert_close(got, oracle_logits(oracle_of("llama"), [*ids, 7])[-1], atol=1e-4, rtol=0)
    engine.forget_plan()
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


def test_models_may_share_a_process() -> None:
    ids = tokens(30)
    for name in ("llama", "qwen3", "llama"):
        check_answer(engine_of(name), ids, 8, name)
    assert adapter_of("llama").fingerprint != adapter_of("qwen3").fingerprint
