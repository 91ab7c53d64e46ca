"""Figures of policies: paired by question, per task, and nothing lost on the way."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from spolia_core.errors import InvalidRequest
from spolia_fidelity.figures import figures_of
from spolia_fidelity.measures import Outcome


def outcome(case: int, index: int, *, task: str = "fact", nll: float = 1.0, exact: bool | None = True) -> Outcome:
    kl = 0.0 if exact else 0.5
    return Outcome(f"c{case}", f"c{case}", index, task, nll, 2, (kl, 0.0), 2 if exact else 1, exact)


FULL = [outcome(case, index, task=("fact", "cut")[index % 2]) for case in range(20) for index in range(4)]
"""20 cases of 2 facts and 2 cuts, all right, half a nat per token."""
WORSE = [
    replace(row, exact=False, nll_sum=2.0, kls=(0.5, 0.0), num_agreed=1) if row.index == 1 else row for row in FULL
]
"""The first cut of every case is lost."""


def test_the_same_outcomes_lose_exactly_nothing() -> None:
    figures = figures_of({"full": FULL, "link:16": FULL}, seed=0)["link:16"]
    for part in (figures.overall, *figures.tasks):
        assert part.loss_points is not None
        for estimate in (part.nll_increase, part.loss_points, part.kl_mean, part.kl_p99):
            assert (estimate.value, estimate.low, estimate.high) == (0.0, 0.0, 0.0)
        assert part.agreement.value == 1.0
        assert part.num_changed == 0


def test_what_is_lost_stands_under_its_task_in_its_unit() -> None:
    figures = figures_of({"full": FULL, "naive": WORSE}, seed=0)["naive"]
    fact, cut = figures.tasks
    assert (fact.task, cut.task, figures.overall.task) == ("fact", "cut", "all")
    assert (fact.num_questions, cut.num_questions, figures.overall.num_questions) == (40, 40, 80)
    assert fact.loss_points is not None
    assert cut.loss_points is not None
    assert cut.exact is not None
    assert (fact.loss_points.value, cut.loss_points.value) == (0.0, 50.0)
    assert cut.exact.value == 0.5
    assert cut.nll_increase.value == pytest.approx(0.25)  # one nat more on one of two questions of two tokens each
    assert cut.nll.value == pytest.approx(0.75)
    assert cut.kl_mean.value == pytest.approx(0.125)
    assert cut.kl_p99.value == 0.5
    assert cut.agreement.value == 0.75
    assert cut.num_changed == 20


def test_a_gain_is_a_negative_loss() -> None:
    figures = figures_of({"full": WORSE, "link:4": FULL}, seed=0)["link:4"].overall
    assert figures.loss_points is not None
    assert figures.loss_points.value == -25.0
    assert figures.nll_increase.value < 0


def test_the_order_in_which_outcomes_arrive_does_not_matter() -> None:
    shuffled = random.Random(3).sample(WORSE, len(WORSE))
    assert figures_of({"full": FULL, "naive": shuffled}, seed=0) == figures_of({"full": FULL, "naive": WORSE}, seed=0)


def test_text_has_no_exact_match_and_does_not_dilute_that_of_others() -> None:
    text = [outcome(case, 9, task="text", exact=None, nll=5.0) for case in range(20)]
    figures = figures_of({"full": FULL + text, "naive": WORSE + text}, seed=0)["naive"]
    assert figures.tasks[2].task == "text"
    assert figures.tasks[2].exact is None
    assert figures.tasks[2].loss_points is None
    assert figures.overall.loss_points is not None
    assert figures.overall.exact is not None
    assert (figures.overall.loss_points.value, figures.overall.exact.value) == (25.0, 0.75)
    assert figures.overall.num_questions == 100


def test_generated_answers_have_an_f1_and_others_none() -> None:
    generated = [replace(row, f1=0.5 if row.exact else 0.0) for row in WORSE]
    figures = figures_of({"full": FULL, "naive": generated}, seed=0)
    assert figures["full"].overall.f1 is None
    f1 = figures["naive"].tasks[1].f1
    assert f1 is not None
    assert f1.value == 0.25


@pytest.mark.parametrize(
    "other", [WORSE[:-1], [*WORSE, outcome(99, 0)], [*WORSE[:-1], outcome(99, 0)], [*WORSE[:-1], WORSE[0]]]
)
def test_a_policy_that_answered_other_questions_is_not_compared(other: list[Outcome]) -> None:
    with pytest.raises(InvalidRequest, match="same questions"):
        figures_of({"full": FULL, "naive": other}, seed=0)


def test_without_full_recompute_there_is_nothing_to_compare_with() -> None:
    with pytest.raises(InvalidRequest, match="'full'"):
        figures_of({"naive": WORSE}, seed=0)
    with pytest.raises(InvalidRequest, match="no questions"):
        figures_of({"full": []}, seed=0)
