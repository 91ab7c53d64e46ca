"""Figures of policies: paired by question, per task, and nothing lost on the way."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from spolia_core.errors import InvalidRequest
from spolia_fidelity.bootstrap import difference_high
from spolia_fidelity.estimate import Estimate
from spolia_fidelity.figures import evidence_of, figures_of
from spolia_fidelity.measures import Outcome
from spolia_fidelity.result import ALL_TASKS


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


@pytest.mark.parametrize("of", [figures_of, evidence_of])
def test_a_task_named_as_all_tasks_together_is_refused(of: Callable[..., object]) -> None:
    rows = [*FULL, outcome(99, 0, task=ALL_TASKS)]
    with pytest.raises(InvalidRequest, match="'c99' has a task named 'all'") as caught:
        of({"full": rows}, seed=0)
    assert caught.value.field == "task"


def test_questions_of_a_context_that_are_lost_together_widen_every_interval() -> None:
    """The same losses, once whole contexts and once one question of each: only what they hang on differs."""
    together = [outcome(i // 4, i % 4, nll=2.0 if i // 4 % 4 == 0 else 1.0, exact=i // 4 % 4 != 0) for i in range(400)]
    apart = [outcome(i // 4, i % 4, nll=2.0 if i % 4 == 0 else 1.0, exact=i % 4 != 0) for i in range(400)]
    full = [outcome(i // 4, i % 4) for i in range(400)]
    wide, narrow = (figures_of({"full": full, "naive": rows}, seed=0)["naive"].tasks[0] for rows in (together, apart))
    for name in ("nll_increase", "kl_mean", "agreement", "exact", "loss_points"):
        a, b = getattr(wide, name), getattr(narrow, name)
        assert a.value == b.value
        assert a.high - a.low > 1.5 * (b.high - b.low), name
    few, many = (evidence_of({"full": full, "naive": rows}, seed=0)["naive"].losses[0] for rows in (together, apart))
    assert few.points.high - few.points.value > 1.5 * (many.points.high - many.points.value)


def test_what_a_bound_is_held_against_is_the_reported_figure_with_an_upper_end_no_lower() -> None:
    figures = figures_of({"full": FULL, "naive": WORSE}, seed=0)["naive"]
    evidence = evidence_of({"full": FULL, "naive": WORSE}, seed=0)["naive"]
    pairs: list[tuple[Estimate, Estimate | None]] = [(evidence.nll_increase, figures.overall.nll_increase)]
    pairs += [(loss.points, part.loss_points) for loss, part in zip(evidence.losses, figures.tasks, strict=True)]
    for held, reported in pairs:
        assert reported is not None
        assert (held.value, held.low) == (reported.value, reported.low)
        assert held.high >= reported.high
    assert [(loss.task, loss.num_clusters) for loss in evidence.losses] == [("fact", 20), ("cut", 20)]


def test_text_is_no_evidence_of_a_task_and_a_task_of_text_only_has_none() -> None:
    text = [outcome(case, 9, task="cut", exact=None, nll=5.0) for case in range(20, 500)]
    found = evidence_of({"full": FULL + text, "naive": WORSE + text}, seed=0)["naive"]
    assert found.num_clusters == 500
    assert [(loss.task, loss.num_clusters, loss.points.value) for loss in found.losses] == [
        ("fact", 20, 0.0),
        ("cut", 20, 50.0),
    ]
    assert not evidence_of({"full": text}, seed=0)["full"].losses


def test_rare_losses_end_where_the_difference_of_shares_ends_with_contexts_taken_whole() -> None:
    full = [outcome(i // 4, i % 4) for i in range(1600)]
    rows = [outcome(i // 4, i % 4, exact=i // 4 not in (3, 99, 250)) for i in range(1600)]
    (loss,) = evidence_of({"full": full, "naive": rows}, seed=0)["naive"].losses
    lost, gained = [not row.exact for row in rows], [False] * len(rows)
    whole = 100 * difference_high(lost, gained, [row.cluster for row in rows])
    alone = 100 * difference_high(lost, gained, [str(i) for i in range(len(rows))])
    assert loss.points.value == 0.75
    assert loss.points.high == whole > 1.4 * alone
