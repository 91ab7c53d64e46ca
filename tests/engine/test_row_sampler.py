"""Rows drawn together are drawn as each alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spolia_core.sampling import SamplingParams
from spolia_engine.row_sampler import NOT_NUMBERS, Draw, sample_rows
from spolia_engine.sampler import sample

params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.01, 0.7, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 5, 64, 65, 1500]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    seed=st.integers(0, 1 << 40),
)
draws = st.builds(Draw, params=params, token_index=st.integers(0, 5000), sample_index=st.integers(0, 3))


def logits_of(num_rows: int, vocab_size: int, spread: float, seed: int) -> torch.Tensor:
    return spread * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def alone(logits: torch.Tensor, draw: Draw) -> int:
    return sample(logits, draw.params, draw.token_index, draw.sample_index)


@settings(max_examples=150, deadline=None)
@given(
    drawn=st.lists(draws, min_size=1, max_size=8),
    vocab_size=st.sampled_from([2, 65, 66, 97, 1100, 3000]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 3.0, 20.0]),
    is_coarse=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_each_row_is_drawn_as_if_alone(
    drawn: list[Draw], vocab_size: int, spread: float, is_coarse: bool, seed: int
) -> None:
    """Also where logits are equal: in 16 bits many are."""
    logits = logits_of(len(drawn), vocab_size, spread, seed)
    if is_coarse:
        logits = logits.bfloat16().float()
    expected = [alone(row, draw) for row, draw in zip(logits, drawn, strict=True)]
    assert sample_rows(logits, drawn) == expected


@pytest.mark.parametrize("spread", [0.3, 4.0])
def test_the_likeliest_few_are_looked_at_first_and_decide_where_they_can(
    spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sure model's rows are never drawn one by one; a flat one's are where 1,024 candidates do not do."""
    one_by_one: list[int] = []
    monkeypatch.setattr(
        "spolia_engine.row_sampler.sample", lambda logits, *args: one_by_one.append(1) or sample(logits, *args)
    )
    drawn = [Draw(SamplingParams(temperature=1.0, top_p=0.9, seed=i), i) for i in range(16)]
    logits = logits_of(16, 20_000, spread, 1)
    assert sample_rows(logits, drawn) == [alone(row, draw) for row, draw in zip(logits, drawn, strict=True)]
    assert len(one_by_one) == (16 if spread < 1 else 0)


def test_infinite_logits_are_never_drawn_and_the_first_of_the_largest_is_greedy() -> None:
    logits = torch.full((3, 300), -torch.inf)
    logits[:, 40], logits[:, 50] = 2.0, 2.0
    drawn = [Draw(SamplingParams(temperature=t, seed=4), 7) for t in (0.0, 1.0, 0.5)]
    found = sample_rows(logits, drawn)
    assert found[0] == 40
    assert found == [alone(row, draw) for row, draw in zip(logits, drawn, strict=True)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_no_numbers_is_told_and_its_neighbours_are_drawn(temperature: float) -> None:
    logits = logits_of(3, 500, 2.0, 5)
    drawn = [Draw(SamplingParams(temperature=temperature, seed=i), i) for i in range(3)]
    expected = [alone(row, draw) for row, draw in zip(logits, drawn, strict=True)]
    logits[1, 333] = torch.nan
    assert sample_rows(logits, drawn) == [expected[0], NOT_NUMBERS, expected[2]]
