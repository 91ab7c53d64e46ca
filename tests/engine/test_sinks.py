"""Dummy sinks: computed before a chunk, dropped behind it, and part of what a chunk's id says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engine_worlds import (
    BOS,
    MAX_CONTEXT,
    VOCAB_SIZE,
    adapter_of,
    assert_nothing_held,
    check_greedy,
    engine_of,
    letters,
    model_of,
    only_in_extents,
    oracle_greedy,
    oracle_of,
    tokens,
)
from link_oracle import chunk_kv, link, next_logits
from torch import Tensor

from spolia_core.errors import InvalidRequest, NotSupported
from spolia_core.prompt import Part, Prompt
from spolia_core.reuse import ChunkKind, ReuseMode, TokenSource
from spolia_core.sampling import SamplingParams
from spolia_engine.adapter import ModelAdapter
from spolia_engine.core import EngineCore
from spolia_engine.engine import Engine
from spolia_engine.extent import BlockState
from spolia_engine.link_plan import plan_link
from spolia_engine.run import Run

pytestmark = pytest.mark.usefixtures("place")


def compiled(engine: Engine, token_ids: list[int]) -> Run:
    chunk_id = engine.chunk(token_ids).chunk_id
    assert chunk_id is not None
    return engine.compile(chunk_id, token_ids)


def deviation(run: Run, expected: list[tuple[Tensor, Tensor]]) -> float:
    """Largest difference of K and V from the oracle's, relative to the scale of each tensor."""
    errors = []
    for layer, (key, value) in enumerate(expected):
        for mine, its in ((run.extent.key[layer], key[0]), (run.extent.value[layer], value[0])):
            errors.append(float((mine.cpu() - its).abs().max() / its.abs().max()))
    return max(errors)


# What is compiled


@pytest.mark.parametrize("num_sink_tokens", [1, 4, 16])
@pytest.mark.parametrize("name", ["llama-bos", "llama-yarn-bos", "qwen3-bos"])
def test_a_chunk_is_computed_behind_the_sinks_and_keeps_nothing_of_them(name: str, num_sink_tokens: int) -> None:
    engine, ids = engine_of(name, num_sink_tokens=num_sink_tokens), tokens(48)
    run = compiled(engine, ids)
    assert (run.num_tokens, run.rope_base, run.extent.capacity) == (48, 0, 48)
    assert engine.pool.counts()[BlockState.REFERENCED] == 48 // engine.pool.block_size
    assert deviation(run, chunk_kv(oracle_of(name), ids, sinks=[BOS] * num_sink_tokens)) <= 1e-5
    # The law above would be void if sinks changed nothing.
    assert deviation(run, chunk_kv(oracle_of(name), ids)) > 1e-2
    engine.pool.release(run.extent)
    assert_nothing_held(engine)


def test_without_sinks_a_chunk_stands_alone() -> None:
    engine, ids = engine_of("llama-bos"), tokens(48)
    run = compiled(engine, ids)
    assert deviation(run, chunk_kv(oracle_of("llama-bos"), ids)) <= 1e-5
    engine.pool.release(run.extent)


@only_in_extents
def test_rotation_at_negative_positions_undoes_that_at_positive_ones() -> None:
    rotary = adapter_of("llama-yarn-bos").rotary
    positions = torch.arange(-5000, 5001)
    angles = torch.outer(positions.double(), rotary.inv_freq)
    cos, sin = rotary.cos_sin(positions)
    torch.testing.assert_close(cos.double(), angles.cos(), atol=1e-7, rtol=0)
    torch.testing.assert_close(sin.double(), angles.sin(), atol=1e-7, rtol=0)
    assert torch.equal(cos, cos.flip(0))
    assert torch.equal(sin, -sin.flip(0))


# Identity


def test_chunks_of_other_recipes_are_never_taken_for_one_another() -> None:
    engines = [engine_of("llama-bos", num_sink_tokens=s) for s in (0, 1, 4)]
    assert [engine.recipe.num_sink_tokens for engine in engines] == [0, 1, 4]
    assert len({engine.chunk(tokens(20)).chunk_id for engine in engines}) == 3
    for engine in engines:
        engine.pool.release(compiled(engine, tokens(20)).extent)
        others = [other.chunk(tokens(20)).chunk_id for other in engines if other is not engine]
        assert all(other not in engine.resident for other in others)
        wrong = Prompt((Part((BOS,)), Part(tuple(tokens(20)), others[0]), Part((1,))))
        with pytest.raises(InvalidRequest, match="another chunk"):
            engine.generate(wrong, mode=ReuseMode.LINKED)


# Refusals


def test_a_model_without_a_begin_of_sequence_token_has_no_sinks() -> None:
    with pytest.raises(NotSupported, match="bos_token_id") as caught:
        engine_of("llama", num_sink_tokens=1)
    assert caught.value.field == "num_sink_tokens"
    assert engine_of("llama", num_sink_tokens=0).recipe.num_sink_tokens == 0


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    model_of("llama-bos").save_pretrained(tmp_path)
    return tmp_path


def with_bos(folder: Path, *said: object) -> ModelAdapter:
    """The model with what its config.json says of the token; without `said` it says nothing."""
    file = folder / "config.json"
    config = {name: value for name, value in json.loads(file.read_text()).items() if name != "bos_token_id"}
    file.write_text(json.dumps({**config, "bos_token_id": said[0]} if said else config))
    return ModelAdapter.load(folder)


@pytest.mark.parametrize("said", [(), (None,), (-1,), (VOCAB_SIZE,)])
def test_a_begin_of_sequence_token_that_the_file_does_not_name_is_never_made_up(
    model_dir: Path, said: tuple[object, ...]
) -> None:
    adapter = with_bos(model_dir, *said)  # without a word of it, transformers says 1, which may be the end of a text
    assert adapter.bos_token_id is None
    with pytest.raises(NotSupported, match="bos_token_id"):
        EngineCore(adapter, letters, num_blocks=4, num_sink_tokens=1)


def test_the_token_that_sinks_are_made_of_enters_the_fingerprint(model_dir: Path) -> None:
    loaded = [with_bos(model_dir, *said) for said in ((), (0,), (1,), (BOS,))]
    assert [adapter.bos_token_id for adapter in loaded] == [None, 0, 1, BOS]
    assert len({adapter.fingerprint for adapter in loaded}) == 4
    assert loaded[-1].fingerprint == adapter_of("llama-bos").fingerprint


@pytest.mark.parametrize("number", [-1, MAX_CONTEXT])
def test_a_number_of_sinks_that_cannot_be_is_refused(number: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        EngineCore(adapter_of("llama-bos"), lambda _: "", num_blocks=4, num_sink_tokens=number)
    assert caught.value.field == "num_sink_tokens"
    assert str(number) in caught.value.message


# End to end


def documents(engine: Engine) -> Prompt:
    a, b = engine.chunk(tokens(90, 1)), engine.chunk(tokens(40, 2))
    return Prompt((Part((BOS,)), a, b, Part(tuple(tokens(4, 4))), a, Part(tuple(tokens(5, 5)))))


@pytest.mark.parametrize("k", [0, 16])
def test_linked_answers_with_sinks_are_those_of_the_dense_oracle(k: int) -> None:
    engine, count = engine_of("qwen3-bos", num_sink_tokens=4), 8
    prompt, model = documents(engine), oracle_of("qwen3-bos")
    linked = link(model, prompt, plan_link(prompt, k).positions, sinks=[BOS] * 4)
    logits, expected, margins = linked.logits[-1], [], []
    for index in range(count):
        best = torch.topk(logits, 2)
        expected.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        logits = next_logits(model, linked, prompt.num_tokens + index, expected[-1])
    params = SamplingParams(max_tokens=count)
    cold = engine.generate(prompt, params, mode=ReuseMode.LINKED, num_link_tokens=k)
    warm = engine.generate(prompt, params, mode=ReuseMode.LINKED, num_link_tokens=k)
    assert check_greedy(cold.token_ids, expected, margins) >= 4
    assert warm.token_ids == cold.token_ids
    assert warm.reuse.num_reused_tokens == warm.reuse.sources[TokenSource.DEVICE] == 220 - 3 * k
    assert len(engine.resident.held(ChunkKind.LOCAL)) == 2
    assert_nothing_held(engine)


def test_linked_with_sinks_and_all_recomputed_is_the_exact_answer() -> None:
    engine = engine_of("llama-bos", num_sink_tokens=4)
    for prompt in (documents(engine), Prompt(documents(engine).parts[1:])):  # also with a chunk at position 0
        expected, margins = oracle_greedy(oracle_of("llama-bos"), prompt.token_ids, 8)
        answer = engine.generate(prompt, SamplingParams(max_tokens=8), mode=ReuseMode.LINKED, num_link_tokens=90)
        assert check_greedy(answer.token_ids, expected, margins) >= 4
        assert answer.reuse.num_reused_tokens == 0
    assert_nothing_held(engine)


@pytest.mark.parametrize("num_sink_tokens", [0, 4])
def test_kv_compiled_behind_sinks_never_becomes_a_prefix_chunk_even_at_position_0(num_sink_tokens: int) -> None:
    engine, ids = engine_of("llama-bos", num_sink_tokens=num_sink_tokens), tokens(200, 1)
    prompt = Prompt((engine.chunk(ids), Part(tuple(tokens(60, 2)))))
    context = engine.linked_context(prompt, {0: compiled(engine, ids)}, plan_link(prompt, 0))
    forks = engine.fork(context, [[1], [2]])
    assert all(span.offset == 0 for span in context.spans)
    for each in (context, *forks.contexts):
        assert each.is_exact == (num_sink_tokens == 0)
    if num_sink_tokens:
        with pytest.raises(AssertionError, match="no prefix chunk"):
            engine.register_prefix(context, list(engine.ids.prefix_chain(prompt.token_ids)))
    forks.close()
    context.close()
    assert_nothing_held(engine)


def test_a_linked_context_that_reuses_nothing_is_exact_whatever_the_recipe() -> None:
    engine = engine_of("llama-bos", num_sink_tokens=4)
    context = engine.linked_context(Prompt.live(tokens(9)), {})
    assert context.is_exact
    context.close()


def test_sinks_leave_exact_answers_alone() -> None:
    prompt, params = Prompt.live(tokens(150)), SamplingParams(max_tokens=8)
    plain, with_sinks = engine_of("llama-bos"), engine_of("llama-bos", num_sink_tokens=4)
    assert plain.generate(prompt, params).token_ids == with_sinks.generate(prompt, params).token_ids
