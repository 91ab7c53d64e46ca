"""Draws follow the distribution transformers would draw from, and depend on the counter only."""

from __future__ import annotations

import math

import pytest
import torch
from engine_worlds import engine_of, step, tokens
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from spolia_core.errors import InternalError
from spolia_core.prompt import Prompt
from spolia_core.sampling import SamplingParams
from spolia_engine import sampler
from spolia_engine.sampler import sample
from spolia_engine.sequence_starts import start_sequence

NUM_DRAWS = 4000


def logits(seed: int = 0, count: int = 40) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 2


def exact_probabilities(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """What transformers' own processors leave."""
    row = (scores.double() / 1.0)[None]
    if params.temperature != 1.0:
        row = TemperatureLogitsWarper(params.temperature)(None, row)
    if params.top_k:
        row = TopKLogitsWarper(params.top_k)(None, row)
    if params.top_p < 1:
        row = TopPLogitsWarper(params.top_p)(None, row)
    return torch.softmax(row[0], -1)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_is_argmax_whatever_the_filters(seed: int) -> None:
    scores = logits(seed)
    for params in (SamplingParams(), SamplingParams(top_k=3, top_p=0.2, seed=9)):
        assert sample(scores, params, token_index=seed) == int(scores.argmax())


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert sample(torch.tensor([0.0, 2.0, 2.0]), SamplingParams(), 0) == 1


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=3.0),
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=1.0, top_p=0.7),
        SamplingParams(temperature=2.0, top_k=12, top_p=0.8),
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=1.0, top_p=1e-6),
        SamplingParams(temperature=1.0, top_k=1000),
    ],
    ids=lambda p: f"t{p.temperature}-k{p.top_k}-p{p.top_p}",
)
def test_draws_follow_the_distribution_of_transformers_processors(params: SamplingParams) -> None:
    scores = logits(7)
    expected = exact_probabilities(scores, params) * NUM_DRAWS
    counts = torch.zeros(len(scores), dtype=torch.float64)
    for index in range(NUM_DRAWS):
        counts[sample(scores, params, token_index=index)] += 1
    assert not bool(counts[expected == 0].any()), "a token was drawn that the filters had removed"
    often = expected >= 5
    bins = [counts[often], counts[~often].sum()[None]]
    wanted = [expected[often], expected[~often].sum()[None]]
    observed, mean = torch.cat(bins), torch.cat(wanted)
    observed, mean = observed[mean > 0], mean[mean > 0]
    statistic = float(((observed - mean) ** 2 / mean).sum())
    freedom = max(1, len(mean) - 1)
    # Five standard deviations of a chi-square; the draws are fixed, so this passes always or never.
    assert statistic <= freedom + 5 * math.sqrt(2 * freedom), statistic


def test_a_draw_depends_on_seed_and_indices_only() -> None:
    scores, params = logits(1), SamplingParams(temperature=1.5, seed=42)
    first = [sample(scores, params, index) for index in range(50)]
    assert [sample(scores, params, index) for index in reversed(range(50))] == first[::-1]
    assert [sample(scores, SamplingParams(temperature=1.5, seed=43), index) for index in range(50)] != first
    assert [sample(scores, params, index, sample_index=1) for index in range(50)] != first


def test_a_replay_draws_on_where_the_first_left_off() -> None:
    engine, params = engine_of(), SamplingParams(temperature=1.2, top_p=0.95, seed=5, max_tokens=30)
    ids = tokens(20)
    whole = engine.generate(Prompt.live(ids), params).token_ids
    context = engine.exact_context([*ids, *whole[:12]], [])
    generation = engine.generation(params)
    assert generation.resume(whole[:12], 0) is None
    sequence = start_sequence(context, generation)
    generation.accept(engine.decoding.first_token(context, params, token_index=12))
    while not sequence.finished:
        step(engine, sequence)
    sequence.close()
    assert tuple(generation.token_ids) == whole


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-9, 100.0])
def test_no_temperature_breaks_the_draw(temperature: float) -> None:
    scores = logits(2)
    drawn = {sample(scores, SamplingParams(temperature=temperature), index) for index in range(20)}
    assert drawn == {int(scores.argmax())} if temperature < 1 else len(drawn) > 5


def test_tokens_of_no_probability_are_never_drawn() -> None:
    scores = torch.full((50,), float("-inf"))
    scores[[3, 17]] = 0.0
    drawn = {sample(scores, SamplingParams(temperature=1.0), index) for index in range(200)}
    assert drawn == {3, 17}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error_never_a_token(temperature: float) -> None:
    scores = logits(3)
    scores[5] = torch.nan
    with pytest.raises(InternalError, match="not numbers"):
        sample(scores, SamplingParams(temperature=temperature), 0)


@pytest.mark.parametrize("few", [1, 3, 17])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 10])
def test_looking_at_the_likeliest_first_draws_what_looking_at_all_does(
    few: int, temperature: float, top_p: float, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=5)
    expected = [sample(logits(3), params, index) for index in range(60)]
    monkeypatch.setattr(sampler, "FEW_CANDIDATES", few)
    assert [sample(logits(3), params, index) for index in range(60)] == expected
