"""Which policies keep the bounds, and how sure that is.

A policy is taken only where the *upper end* of the paired 95 % interval lies within the bound, for every figure: by the
point estimate one whose true loss is the bound would pass every second time.

    kept        the upper end is within the bound
    broken      the lower end is above it: more questions would not help
    undecided   the bound lies inside the interval, or the sample is too small to have one worth the name

Two figures count, each of every source of cases alone: ΔNLL per scored token (the worst source decides), and the points
of exact match lost on each task (the worst task decides), as far as the model can do the task.

Task loss. A percentile bootstrap of few rare losses ends too low, so the upper end is the highest of three: the
bootstrap's; that of the difference of two shares from Wilson's intervals and their design effect (`difference_high`);
and, since neither sees what the sample does not hold, 1 - 0.025^(1/c), about 3.7 / c, the loss that leaves no trace in
c contexts once in 40 times where a context is lost as a whole (Clopper & Pearson, Biometrika 26, 1934). It counts
contexts that hold a question of the task, so a bound of one point needs 368 of them. Simulated, with 400 to 3,000
questions and correlations up to 0.3 inside a context, a policy that loses exactly the bound is kept in 0 to 5 % of runs
(by percentiles alone in 4 to 18 %). Where some contexts of eight questions stand or fall as a whole it was 12 %: few
lost contexts show too little of how they hang together.

ΔNLL. The upper end is bootstrap-t's where that lies above the percentiles'. Simulated at the bound, that keeps 2 to 3 %
where contexts' differences are normal; it stays too low where they have a heavy tail: of lognormal ones (σ of 1 and of
1.5) 7 and 13 % with 20 contexts, 5 and 9 % with 60, 4 and 6 % with 200 (by percentiles alone 13 and 24, 9 and 16, 5 and
10 %). What is too rare to be in the sample at all is not seen.

Not corrected for: the choice. Every figure of every policy is judged by itself, and the cheapest policy kept is taken.
Of several policies just beyond a bound, that one of them is kept is likelier than the rates above, which are those of
one figure of one policy. That a policy has to keep all of its figures works against it, at no stated rate.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from spolia_core.profile import Bounds
from spolia_fidelity.estimate import Estimate
from spolia_fidelity.figures import Evidence
from spolia_fidelity.result import PolicyResult

MIN_CLUSTERS = 20
"""Independent contexts, of a source for its ΔNLL and of a task for its loss, below which nothing is decided."""
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
class SourceEvidence:
    """A policy's evidence over one source of cases."""

    name: str
    evidence: Evidence


def judge(policy: PolicyResult, sources: Sequence[SourceEvidence], bounds: Bounds) -> Judged:
    """A policy's evidence against the bounds; `sources` holds that of each source alone.

    A task that several sources share is judged in each: a good source does not make up for a bad one.
    """
    nlls = [
        _margin(
            f"ΔNLL of {source.name}",
            source.evidence.nll_increase,
            bounds.max_nll_increase_nats,
            Bounds().max_nll_increase_nats,
            source.evidence.num_clusters,
        )
        for source in sources
    ]
    num_sources = Counter(loss.task for source in sources for loss in source.evidence.losses)
    losses = [
        _margin(
            f"loss of {loss.task}" + (f" in {source.name}" if num_sources[loss.task] > 1 else ""),
            loss.points,
            bounds.max_task_loss_points,
            Bounds().max_task_loss_points,
            loss.num_clusters,
            least_high=100.0 * unseen_loss(loss.num_clusters),
        )
        for source in sources
        for loss in source.evidence.losses
    ]
    return Judged(
        policy,
        (*nlls, *losses),
        max(margin.value for margin in nlls),
        max((margin.value for margin in losses), default=None),
    )


def unseen_loss(num_contexts: int) -> float:
    """The largest share of lost contexts that leaves no trace in `num_contexts` with a chance of `TAIL`."""
    return 1.0 - float(TAIL ** (1.0 / num_contexts))


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
