"""Laws of the verdict: a policy passes by its interval's upper end, and never for want of data."""

from __future__ import annotations

import math

import pytest

from spolia_core.profile import Bounds
from spolia_fidelity.estimate import Estimate
from spolia_fidelity.result import ALL_TASKS, Figures, PolicyResult
from spolia_fidelity.verdict import (
    MIN_CLUSTERS,
    Judged,
    SourceFigures,
    Verdict,
    cheapest_kept,
    judge,
    least_bad,
    unseen_loss,
)

BOUNDS = Bounds(0.01, 1.0)
NOTHING = Estimate(0.0, 0.0, 0.0)


def figures(task: str, nll: Estimate, loss: Estimate | None, num_questions: int = 1000) -> Figures:
    return Figures(task, num_questions, 4 * num_questions, NOTHING, nll, NOTHING, NOTHING, NOTHING, loss, loss)


def judged(
    nll: Estimate = NOTHING,
    loss: Estimate | None = NOTHING,
    *,
    name: str = "link:8",
    recomputed: int = 8,
    num_questions: int = 1000,
    num_clusters: int = 100,
) -> Judged:
    overall, cut = figures(ALL_TASKS, nll, loss, num_questions), figures("cut", nll, loss, num_questions)
    policy = PolicyResult(name, recomputed, 128 - recomputed, 1.0, overall, (cut,))
    return judge(policy, [SourceFigures("synthetic", frozenset({"cut"}), num_clusters, overall)], BOUNDS)


@pytest.mark.parametrize(
    ("nll", "loss", "verdict"),
    [
        (Estimate(0.005, 0.001, 0.009), Estimate(0.2, -0.4, 0.8), Verdict.KEPT),
        (Estimate(0.005, 0.001, 0.011), Estimate(0.2, -0.4, 0.8), Verdict.UNDECIDED),
        (Estimate(0.015, 0.011, 0.019), Estimate(0.2, -0.4, 0.8), Verdict.BROKEN),
        (Estimate(0.005, 0.001, 0.009), Estimate(0.9, 0.2, 1.6), Verdict.UNDECIDED),
        (Estimate(0.005, 0.001, 0.009), Estimate(3.0, 1.5, 4.5), Verdict.BROKEN),
        (Estimate(0.005, 0.001, 0.009), None, Verdict.KEPT),
        (Estimate(-0.005, -0.009, -0.001), Estimate(-2.0, -3.0, -1.0), Verdict.KEPT),
    ],
)
def test_the_end_of_the_interval_decides(nll: Estimate, loss: Estimate | None, verdict: Verdict) -> None:
    assert judged(nll, loss).verdict is verdict


def test_few_contexts_or_no_interval_decide_nothing() -> None:
    assert judged(num_clusters=MIN_CLUSTERS).verdict is Verdict.KEPT
    assert judged(num_clusters=MIN_CLUSTERS - 1).verdict is Verdict.UNDECIDED
    assert judged(Estimate(0.0, math.nan, math.nan)).verdict is Verdict.UNDECIDED


def test_no_loss_among_few_questions_proves_little() -> None:
    """A bootstrap of questions none of which differs says [0, 0], however few there are."""
    assert judged(num_questions=367).verdict is Verdict.UNDECIDED
    assert judged(num_questions=368).verdict is Verdict.KEPT
    # A policy that loses this share of questions shows no loss in so many of them once in 40 times.
    assert (1 - unseen_loss(368)) ** 368 == pytest.approx(0.025)


def test_the_worst_source_and_the_worst_task_decide() -> None:
    overall = figures(ALL_TASKS, NOTHING, NOTHING)
    fact, cut = figures("fact", NOTHING, NOTHING), figures("cut", NOTHING, Estimate(5.0, 4.0, 6.0))
    policy = PolicyResult("naive", 0, 128, 1.0, overall, (fact, cut))
    bad_text = figures(ALL_TASKS, Estimate(0.2, 0.1, 0.3), None)
    sources = [
        SourceFigures("synthetic", frozenset({"fact", "cut"}), 100, overall),
        SourceFigures("book.txt", frozenset({"book"}), 100, bad_text),
    ]
    found = judge(policy, sources, BOUNDS)
    assert (found.worst_nll_increase, found.worst_task_loss) == (0.2, 5.0)
    assert [margin.figure for margin in found.margins if margin.verdict is Verdict.BROKEN] == [
        "ΔNLL of book.txt",
        "loss of cut",
    ]
    assert found.worst.figure == "ΔNLL of book.txt"  # 29 bounds too high, the loss only 5


def test_the_cheapest_that_keeps_the_bounds_is_taken_and_sinks_cost_nothing_but_come_second() -> None:
    bad = Estimate(1.0, 0.9, 1.1)
    ladder = [
        judged(bad, name="naive", recomputed=0),
        judged(name="link:16", recomputed=16),
        judged(name="link:8", recomputed=8),
        judged(name="sinks:4+link:8", recomputed=8),
    ]
    found = cheapest_kept(ladder)
    assert found is not None
    assert found.policy.name == "link:8"
    assert cheapest_kept(ladder[:1]) is None


def test_where_none_keeps_them_the_nearest_is_named() -> None:
    far, near = judged(Estimate(1.0, 0.9, 1.1), name="naive"), judged(Estimate(0.02, 0.015, 0.025), name="link:8")
    assert least_bad([far, near]).policy.name == "link:8"
