"""Divergence, likelihood and first choices, against the definitions written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spolia_core.errors import InternalError
from spolia_fidelity.case import Case, Question
from spolia_fidelity.measures import Distributions, first_choices, kl_divergence, score, token_nlls

VOCAB = 7


def logits(seed: int, rows: int = 4, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def slow_kl(full: list[float], other: list[float]) -> float:
    def probs(row: list[float]) -> list[float]:
        total = math.fsum(math.exp(x) for x in row)
        return [math.exp(x) / total for x in row]

    return math.fsum(p * math.log(p / q) for p, q in zip(probs(full), probs(other), strict=True))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_kl_is_the_definition_and_never_negative(seed: int, other_seed: int) -> None:
    full, other = logits(seed), logits(other_seed)
    found = kl_divergence(Distributions.of(full).log_probs, Distributions.of(other).log_probs)
    expected = [slow_kl(a, b) for a, b in zip(full.tolist(), other.tolist(), strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert bool((found >= 0).all())


def test_kl_points_from_full_recompute_to_the_policy() -> None:
    full = torch.tensor([[math.log(0.9), math.log(0.1)]])
    policy = torch.tensor([[math.log(0.5), math.log(0.5)]])
    found = kl_divergence(Distributions.of(full).log_probs, Distributions.of(policy).log_probs)
    assert float(found) == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), abs=1e-7)


def test_equal_distributions_diverge_by_exactly_nothing() -> None:
    log_probs = Distributions.of(logits(3, rows=50)).log_probs
    assert kl_divergence(log_probs, log_probs).tolist() == [0.0] * 50


def test_a_shift_of_all_logits_changes_nothing_however_large() -> None:
    shifted = Distributions.of(logits(1).double() + 5e4)
    assert torch.allclose(shifted.log_probs, Distributions.of(logits(1).double()).log_probs, atol=1e-9)


def test_a_token_only_the_policy_excludes_is_infinitely_far_and_one_the_reference_excludes_is_not() -> None:
    whole, cut = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -math.inf]])
    a, b = Distributions.of(whole).log_probs, Distributions.of(cut).log_probs
    assert float(kl_divergence(a, b)) == math.inf
    assert float(kl_divergence(b, a)) == pytest.approx(math.log(1.5))


def test_a_divergence_below_zero_by_more_than_rounding_is_reported_not_clamped() -> None:
    not_normalised = torch.tensor([[math.log(0.2), math.log(0.2)]], dtype=torch.float64)
    with pytest.raises(InternalError, match="KL divergence"):
        kl_divergence(not_normalised, Distributions.of(torch.zeros(1, 2)).log_probs)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    broken = logits(0)
    broken[2, 3] = bad
    with pytest.raises(InternalError, match="NaN or infinite"):
        Distributions.of(broken)


def test_of_equal_logits_the_lowest_id_is_the_first_choice() -> None:
    rows = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 5.0]])
    assert first_choices(rows).tolist() == [1, 0, 3]
    wide = torch.zeros(1, 50_000)
    wide[0, 17::13] = 1.0
    assert first_choices(wide.to(torch.bfloat16)).tolist() == [17]


def test_nll_is_minus_the_log_probability_of_the_given_token() -> None:
    rows = torch.tensor([[math.log(0.25), math.log(0.75)], [math.log(0.5), math.log(0.5)]])
    nlls = token_nlls(Distributions.of(rows).log_probs, (0, 1))
    assert nlls.tolist() == pytest.approx([math.log(4), math.log(2)])
    with pytest.raises(InternalError, match="1 tokens to score against 2"):
        token_nlls(Distributions.of(rows).log_probs, (0,))


def one_hot(*ids: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(ids), VOCAB).float() * 9


@pytest.mark.parametrize(("exact", "expected"), [(True, [True, False]), (False, [None, None])])
def test_an_answer_is_exact_when_every_token_is_the_first_choice(exact: bool, expected: list[bool | None]) -> None:
    case = Case("c", (), ((1, 2),), (Question("fact", (3,), (4, 5), exact),), cluster="story")
    full = Distributions.of(one_hot(4, 5))
    other = Distributions.of(one_hot(4, 6))
    right, wrong = score(case, 0, full, full), score(case, 0, other, full)
    assert [right.exact, wrong.exact] == expected
    assert (right.num_agreed, wrong.num_agreed) == (2, 1)
    assert right.kls == (0.0, 0.0)
    assert wrong.kls[0] == 0.0 < wrong.kls[1]
    assert (wrong.key, wrong.cluster, wrong.task, wrong.num_tokens) == (("c", 0), "story", "fact", 2)
    assert wrong.nll_sum > right.nll_sum
