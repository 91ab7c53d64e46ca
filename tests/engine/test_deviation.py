"""CacheBlend's choice: the reused tokens whose V at layer 1 is furthest from that of full recompute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from engine_worlds import BOS, adapter_of, assert_nothing_held, engine_of, model_of, oracle_of, tokens
from link_oracle import causal, chunk_kv, dense_forward, run_layers
from torch import Tensor
from transformers import DynamicCache

from spolia_core.errors import InvalidRequest, NotSupported
from spolia_core.prompt import Part, Prompt
from spolia_engine import deviation
from spolia_engine.adapter import ModelAdapter
from spolia_engine.context import release_runs
from spolia_engine.engine import Engine
from spolia_engine.link_plan import plan_recompute
from spolia_engine.run import Run


def documents(engine: Engine) -> Prompt:
    """Chunks at several offsets, one of them twice; 165 of 184 tokens are chunk tokens."""
    a, b = engine.chunk(tokens(60, 1)), engine.chunk(tokens(45, 2))
    return Prompt((Part((BOS, 7)), a, b, Part(tuple(tokens(9, 3))), a, Part(tuple(tokens(8, 4)))))


def chunk_positions(prompt: Prompt) -> list[int]:
    positions, base = [], 0
    for part in prompt.parts:
        if part.chunk_id is not None:
            positions += range(base, base + len(part.token_ids))
        base += len(part.token_ids)
    return positions


def runs_of(engine: Engine, prompt: Prompt) -> dict[int, Run]:
    runs = {}
    for index, part in enumerate(prompt.parts):
        if part.chunk_id is not None:
            runs[index] = engine.resident.acquire(part.chunk_id) or engine.compile(part.chunk_id, part.token_ids)
    return runs


def release(engine: Engine, runs: Mapping[int, Run]) -> None:
    release_runs(engine.pool, list(runs.values()))
    assert_nothing_held(engine)


@torch.no_grad()
def oracle_deviation(name: str, prompt: Prompt, sinks: list[int]) -> dict[int, float]:
    """By position, from transformers' own layers over the whole prompt and over each chunk alone."""
    model, ids = oracle_of(name), prompt.token_ids
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    _, cache = run_layers(model, ids, range(len(ids)), causal(seen), DynamicCache())
    fresh, found, base = cache.layers[1].values[0], {}, 0
    for part in prompt.parts:
        count = len(part.token_ids)
        if part.chunk_id is not None:
            alone = chunk_kv(model, part.token_ids, sinks)[1][1][0]
            squares = (fresh[:, base : base + count] - alone).double().square().sum((0, 2))
            found.update({base + i: float(square) for i, square in enumerate(squares)})
        base += count
    return found


@pytest.mark.parametrize("num_sink_tokens", [0, 4])
@pytest.mark.parametrize("name", ["llama-bos", "llama-yarn-bos", "qwen3-bos"])
def test_the_chosen_are_those_that_deviate_most_by_the_dense_oracle(name: str, num_sink_tokens: int) -> None:
    engine = engine_of(name, num_sink_tokens=num_sink_tokens)
    prompt = documents(engine)
    runs, expected = runs_of(engine, prompt), oracle_deviation(name, prompt, [BOS] * num_sink_tokens)
    for share in (0.01, 0.16, 0.5, 0.97):
        chosen = engine.most_deviant(prompt, runs, share)
        assert len(chosen) == len(set(chosen)) == round(share * 165)
        assert list(chosen) == sorted(chosen)
        assert set(chosen) <= set(expected)
        least = min(expected[p] for p in chosen)
        most_left = max(value for p, value in expected.items() if p not in chosen)
        assert least >= most_left * (1 - 1e-3), "a token was left that deviates more than one that was chosen"
    release(engine, runs)


def test_a_planted_deviation_is_found() -> None:
    engine = engine_of()
    prompt = Prompt((Part((1,)), engine.chunk(tokens(60, 1)), engine.chunk(tokens(45, 2)), Part((2, 3))))
    runs = runs_of(engine, prompt)
    planted = [(1, 17), (1, 59), (2, 0), (2, 31)]
    for index, token in planted:
        run = runs[index]
        run.extent.value[1][:, run.start + token] += 50.0
    assert engine.most_deviant(prompt, runs, 4 / 105) == (1 + 17, 1 + 59, 61 + 0, 61 + 31)
    # Another layer's is not looked at.
    runs[1].extent.value[0][:, 5] += 50.0
    runs[1].extent.key[1][:, 5] += 50.0
    assert engine.most_deviant(prompt, runs, 4 / 105) == (1 + 17, 1 + 59, 61 + 0, 61 + 31)
    release(engine, runs)


@pytest.mark.parametrize("num_sink_tokens", [0, 4])
def test_a_share_of_one_is_every_reused_token_and_full_recompute(num_sink_tokens: int) -> None:
    engine = engine_of("llama-bos", num_sink_tokens=num_sink_tokens)
    prompt = documents(engine)
    runs = runs_of(engine, prompt)
    chosen = engine.most_deviant(prompt, runs, 1.0)
    assert list(chosen) == chunk_positions(prompt)
    plan = plan_recompute(prompt, chosen)
    assert not plan.fragments
    context = engine.linked_context(prompt, runs, plan)
    assert context.last_hidden is not None
    got = engine.adapter.logits(context.last_hidden[None])[0]
    expected = dense_forward(oracle_of("llama-bos"), prompt.token_ids)[-1]
    assert float((got - expected).abs().max() / expected.abs().max()) <= 3e-5
    context.close()
    assert_nothing_held(engine)


def test_a_share_of_nothing_is_no_token_and_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    prompt = documents(engine)
    runs = runs_of(engine, prompt)
    monkeypatch.setattr(ModelAdapter, "forward", None)
    assert engine.most_deviant(prompt, runs, 0.0) == engine.most_deviant(prompt, runs, 0.002) == ()
    monkeypatch.undo()
    assert engine.most_deviant(Prompt.live(tokens(9)), {}, 1.0) == ()
    release(engine, runs)


def test_of_equal_deviations_the_earlier_token_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    prompt = documents(engine)
    runs = runs_of(engine, prompt)
    for run in runs.values():
        run.extent.value[1].zero_()
    shape = (engine.adapter.kv_shape.num_kv_heads, prompt.num_tokens, engine.adapter.kv_shape.v_dim)
    monkeypatch.setattr(ModelAdapter, "values_at", lambda *_: torch.ones(shape))
    # Runs in any order: what counts is where their tokens stand.
    backwards = dict(sorted(runs.items(), reverse=True))
    for count in (1, 60, 61, 120):
        assert list(engine.most_deviant(prompt, backwards, count / 165)) == chunk_positions(prompt)[:count]
    monkeypatch.undo()
    release(engine, runs)


def test_one_layer_is_attended_whatever_the_models_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of("llama-deep")
    prompt = documents(engine)
    runs, held = runs_of(engine, prompt), engine.pool.counts()
    attended: list[tuple[int, int]] = []
    original = deviation.attend

    def counting(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        attended.append((query.shape[1], key.shape[1]))
        return original(query, key, value, **kwargs)

    monkeypatch.setattr(deviation, "attend", counting)
    engine.most_deviant(prompt, runs, 0.5)
    assert attended == [(prompt.num_tokens, prompt.num_tokens)]
    assert engine.pool.counts() == held
    release(engine, runs)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_values_at_a_layer_are_what_a_whole_pass_stores_there(layer: int) -> None:
    engine, ids = engine_of("llama-deep"), tokens(30)
    context = engine.exact_context(ids, [])
    values = engine.adapter.values_at(layer, ids, range(30), deviation._attend_rows)
    torch.testing.assert_close(values, context.spans[0].run.extent.value[layer], atol=1e-6, rtol=1e-5)
    with pytest.raises(IndexError, match="4 layers"):
        engine.adapter.values_at(4, ids, range(30), deviation._attend_rows)
    context.close()


# Refusals


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan"), float("inf")])
def test_a_share_outside_0_to_1_is_refused(share: float) -> None:
    engine = engine_of()
    with pytest.raises(InvalidRequest, match="share") as caught:
        engine.most_deviant(documents(engine), {}, share)
    assert (caught.value.field, caught.value.actual) == ("share", str(share))


def test_a_model_of_one_layer_has_nothing_to_compare() -> None:
    assert len(model_of("llama-one-layer").model.layers) == adapter_of("llama-one-layer").num_layers == 1
    engine = engine_of("llama-one-layer")
    with pytest.raises(NotSupported, match="layer 1") as caught:
        engine.most_deviant(documents(engine), {}, 0.5)
    assert caught.value.field == "num_hidden_layers"


def test_a_run_of_another_length_is_refused_and_stays_the_callers() -> None:
    engine = engine_of()
    prompt = documents(engine)
    run = engine.compile(b"other", tokens(59, 1))
    with pytest.raises(InvalidRequest, match=r"parts\[1\]"):
        engine.most_deviant(prompt, {1: run}, 0.5)
    release(engine, {1: run})
