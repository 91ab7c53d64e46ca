"""Which policies keep the bounds, and how sure that is.

A policy is taken only where the *upper end* of the paired 95 % interval lies within the bound, for every figure: so
none passes by luck of the draw, and one whose true loss is the bound passes about once in 40 times per figure. By the
point estimate it would pass every second time.

    kept        the upper end is within the bound
    broken      the lower end is above it: more questions would not help
    undecided   the bound lies inside the interval, or the sample is too small to have one worth the name

Two figures count: ΔNLL per scored token, of each source of cases alone (the worst source decides), and the points of
exact match lost on each task alone (the worst task decides), as far as the model can do the task.

A bootstrap cannot see what the sample does not hold: where no question of n came out differently, its interval is
[0, 0]. With n questions and not one lost, a loss of up to 1 - 0.025^(1/n), about 3.7 / n, is within the 97.5 %
one-sided bound (Clopper & Pearson, Biometrika 26, 1934); no upper end is taken below that. So a bound of one point
needs 368 questions per task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from spolia_core.profile import Bounds
from spolia_fidelity.estimate import Estimate
from spolia_fidelity.result import Figures, PolicyResult

MIN_CLUSTERS = 20
"""Independent contexts below which a percentile interval is too narrow to decide by."""
TAIL = 0.025
"""What either end of the 95 % interval leaves out."""


class Verdict(Enum):
    """Whether a bound was kept."""

    KEPT = "kept"
    BROKEN = "broken"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class Margin:
    """One figure against its bound, both in the figure's unit (nats per token, or points)."""

    figure: str
    """ "ΔNLL of synthetic", "loss of cut"."""
    value: float
    low: float
    high: float
    bound: float
    scale: float
    """What makes nats and points comparable: the default bound of this kind of figure."""
    verdict: Verdict

    @property
    def excess(self) -> float:
        """How far the upper end lies above the bound, in units of `scale`; negative where it is below."""
        return (self.high - self.bound) / self.scale


@dataclass(frozen=True, slots=True)
class Judged:
    """One policy against all bounds."""

    policy: PolicyResult
    margins: tuple[Margin, ...]
    worst_nll_increase: float
    """The worst source's, nats per token."""
    worst_task_loss: float | None
    """The worst task's, points; None where the model can do no task."""

    @property
    def worst(self) -> Margin:
        """The figure whose upper end lies furthest above its bound, or nearest to it."""
        return max(self.margins, key=lambda margin: margin.excess)

    @property
    def verdict(self) -> Verdict:
        """Broken where one bound is; kept where all are."""
        found = {margin.verdict for margin in self.margins}
        return next((v for v in (Verdict.BROKEN, Verdict.UNDECIDED) if v in found), Verdict.KEPT)


@dataclass(frozen=True, slots=True)
class SourceFigures:
    """A policy's figures over one source of cases, and how many independent contexts it has."""

    name: str
    tasks: frozenset[str]
    num_clusters: int
    overall: Figures


def judge(policy: PolicyResult, sources: Sequence[SourceFigures], bounds: Bounds) -> Judged:
    """A policy's figures against the bounds; `sources` holds those of each source alone."""
    nlls = [
        _margin(
            f"ΔNLL of {source.name}",
            source.overall.nll_increase,
            bounds.max_nll_increase_nats,
            Bounds().max_nll_increase_nats,
            source.num_clusters,
        )
        for source in sources
    ]
    losses = [
        _margin(
            f"loss of {figures.task}",
            figures.loss_points,
            bounds.max_task_loss_points,
            Bounds().max_task_loss_points,
            min(source.num_clusters for source in sources if figures.task in source.tasks),
            least_high=100.0 * unseen_loss(figures.num_questions),
        )
        for figures in policy.tasks
        if figures.loss_points is not None
    ]
    return Judged(
        policy,
        (*nlls, *losses),
        max(margin.value for margin in nlls),
        max((margin.value for margin in losses), default=None),
    )


def unseen_loss(num_questions: int) -> float:
    """The largest share of lost questions that leaves no trace in `num_questions` with a chance of `TAIL`."""
    return 1.0 - float(TAIL ** (1.0 / num_questions))


def _margin(
    figure: str, estimate: Estimate, bound: float, scale: float, num_clusters: int, *, least_high: float = -math.inf
) -> Margin:
    value, low, high = estimate.value, estimate.low, max(estimate.high, least_high)
    if not estimate.has_interval or num_clusters < MIN_CLUSTERS:
        verdict = Verdict.UNDECIDED
        low, high = (low, high) if estimate.has_interval else (value, value)
    elif high <= bound:
        verdict = Verdict.KEPT
    else:
        verdict = Verdict.BROKEN if low > bound else Verdict.UNDECIDED
    return Margin(figure, value, low, high, bound, scale, verdict)


def cheapest_kept(judged: Sequence[Judged]) -> Judged | None:
    """Of the policies that keep all bounds, the one that recomputes the fewest tokens; the first where equal."""
    kept = [found for found in judged if found.verdict is Verdict.KEPT]
    return min(kept, key=lambda found: found.policy.recomputed_share, default=None)


def least_bad(judged: Sequence[Judged]) -> Judged:
    """The policy whose worst figure comes nearest to its bound."""
    return min(judged, key=lambda found: found.worst.excess)
