"""The whole in one process: answers, reuse, reports, and a pool that is empty afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from answer_worlds import check_answer, documents, greedy, live
from engine_worlds import (
    MAX_CONTEXT,
    adapter_of,
    assert_nothing_held,
    check_greedy,
    engine_of,
    full_blocks,
    letters,
    oracle_greedy,
    oracle_of,
    step,
    tokens,
)

from spolia_core.prompt import Prompt
from spolia_core.reuse import PREFIX_CHUNK_TOKENS, ChunkKind, FinishReason, MissReason, ReuseMode, TokenSource
from spolia_core.sampling import DEFAULT_MAX_TOKENS
from spolia_engine.context import Context
from spolia_engine.engine import Engine
from spolia_engine.extent import BlockState
from spolia_engine.kv_bytes import layer_of_run, write_layer
from spolia_engine.run import Run
from spolia_engine.sealing import prefix_blocks
from spolia_engine.sequence_starts import start_sequence

pytestmark = pytest.mark.usefixtures("place")


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
    generation.accept(there.decoding.first_token(sent, generation.params))
    sent.close()
    sequence = start_sequence(context, generation)
    while not sequence.finished:
        step(here, sequence)
    sealed = here.seal_answer(
        sequence, prefix_blocks(list(here.ids.prefix_chain([*ids, *generation.token_ids[:-1]])), len(ids) // 128)
    )
    assert len(sealed) == 1
    here.pool.release(sealed[0][1].extent)
    sequence.close()
    here.decoding.forget_plan()
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
    sequence = start_sequence(context, engine.generation(greedy(4)))
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


def test_a_default_answer_shrinks_to_what_the_context_leaves() -> None:
    engine = engine_of()
    assert len(engine.generate(Prompt.live([1] * (MAX_CONTEXT - 3))).token_ids) == 3
    assert len(engine.generate(Prompt.live([1])).token_ids) == DEFAULT_MAX_TOKENS


def test_models_may_share_a_process() -> None:
    ids = tokens(30)
    for name in ("llama", "qwen3", "llama"):
        check_answer(engine_of(name), ids, 8, name)
    assert adapter_of("llama").fingerprint != adapter_of("qwen3").fingerprint
