"""Intervals: a bootstrap that resamples clusters, and Wilson's for single shares.

What an interval covers: the figure's spread if other clusters (contexts, stories) were drawn from the same source, for
this model, these weights and this hardware. Differences are paired by question, so what makes a question hard for both
policies cancels; questions of one cluster are drawn together, so their correlation widens the interval.

What it does not cover: another model, another kind of text, another tokenizer, errors of the harness. Percentile
intervals end too low where clusters are few (below about 30), where a figure comes from few rare events, and where a
few clusters hold most of it. Where no question differs between two policies the paired interval is [0, 0], though with
n questions up to about 3 / n of others may differ (the "rule of three"). What a bound is held against is therefore
`ClusterBootstrap.bounded_ratio` and `difference_high`, which end higher.

Sources: Efron & Tibshirani, An Introduction to the Bootstrap (1993), §12.5 (bootstrap-t), §13; Field & Welsh,
Bootstrapping clustered data (JRSS B 69, 2007); Wilson (JASA 22, 1927); Newcombe (Statistics in Medicine 17, 1998; the
difference of two shares); Kish, Survey Sampling (1965), §8.2 (design effect).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from spolia_core.errors import InvalidRequest
from spolia_fidelity.estimate import Estimate

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DEFAULT_RESAMPLES = 2_000
DEFAULT_LEVEL = 0.95


class ClusterBootstrap:
    """Resamples of the same clusters for any number of figures, so that all of them are paired.

    `clusters[i]` names the cluster of row i; every array given later has one entry per row. Deterministic for a seed
    and an order of rows. Time and memory grow with resamples × clusters.
    """

    def __init__(
        self,
        clusters: Sequence[str],
        *,
        seed: int,
        num_resamples: int = DEFAULT_RESAMPLES,
        level: float = DEFAULT_LEVEL,
    ) -> None:
        if not clusters:
            raise InvalidRequest("no rows to resample", field="clusters", limit="≥ 1", actual="0")
        if num_resamples < 100:
            raise InvalidRequest(
                "too few resamples for an interval", field="num_resamples", limit="≥ 100", actual=str(num_resamples)
            )
        if not 0.0 < level < 1.0:
            raise InvalidRequest("no such level", field="level", limit="between 0 and 1", actual=str(level))
        names = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
        self._cluster_of: Ints = np.array([names[name] for name in clusters], dtype=np.int64)
        self._level = level
        self.num_clusters = len(names)
        self._weights = _draw_weights(self.num_clusters, num_resamples, np.random.default_rng(seed))

    def ratio(self, numerators: Floats, denominators: Floats) -> Estimate:
        """Σ numerators / Σ denominators, for example nats per token. The denominators' sum must be positive."""
        top, bottom = self._per_cluster(numerators), self._per_cluster(denominators)
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = self._sums(top) / self._sums(bottom)
        # A resample without any scored row says nothing; it happens only where few clusters hold them all.
        return self._estimate(float(top.sum() / bottom.sum()), drawn[~np.isnan(drawn)])

    def bounded_ratio(self, numerators: Floats, denominators: Floats) -> Estimate:
        """As `ratio`, but for skewed figures of few clusters: its upper end is bootstrap-t's where that lies higher.

        Each resample's distance from the figure is measured in its own standard error (of a ratio of sums over
        clusters, linearised). Infinite where too many resamples have no spread of their own.
        """
        found = self.ratio(numerators, denominators)
        if not found.has_interval:
            return found
        top, bottom = self._per_cluster(numerators), self._per_cluster(denominators)
        error = math.sqrt(float(((top - found.value * bottom) ** 2).sum())) / float(bottom.sum())
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = self._sums(top) / self._sums(bottom)
            squares = self._sums(top * top) - 2 * drawn * self._sums(top * bottom) + drawn**2 * self._sums(bottom**2)
            distances = (drawn - found.value) / (np.sqrt(np.maximum(squares, 0.0)) / self._sums(bottom))
        distances = distances[~np.isnan(distances)]
        if not error or not len(distances):
            return found
        lowest = float(np.quantile(distances, (1.0 - self._level) / 2.0, method="lower"))
        return Estimate(found.value, found.low, max(found.high, found.value - lowest * error))

    def mean(self, values: Floats) -> Estimate:
        """Mean over rows."""
        return self.ratio(values, np.ones(len(values)))

    def percentile(self, values: Floats, rows: Ints, percent: int) -> Estimate:
        """The smallest of `values` that at least `percent` % of them do not exceed; `values[i]` belongs to `rows[i]`.

        Exact in every resample (integer ranks, no interpolation).
        """
        descending = np.argsort(-values, kind="stable")
        ordered = values[descending]
        clusters = self._cluster_of[rows[descending]]
        counts: Floats = self._sums(np.bincount(clusters, minlength=self.num_clusters).astype(np.float64))
        ranks = counts.astype(np.int64) * (100 - percent) // 100 + 1  # how far down from the highest value
        drawn = ordered[self._places(clusters, ranks)[counts > 0]]
        return self._estimate(float(ordered[len(ordered) * (100 - percent) // 100]), drawn)

    def _places(self, clusters: Ints, ranks: Ints) -> Ints:
        """For each resample, where in a descending list of rows the row of that rank stands."""
        depth = min(len(clusters), int(ranks.max()) * 2 + 64)
        while True:
            reached = np.cumsum(self._weights[:, clusters[:depth]], axis=1) >= ranks[:, None]
            if depth == len(clusters) or bool(reached[:, -1].all()):
                places: Ints = np.argmax(reached, axis=1)
                return places
            depth = min(len(clusters), depth * 2)

    def _sums(self, per_cluster: Floats) -> Floats:
        """Sums of every resample. Not a BLAS product: its threads would wait for busy cores and change last bits."""
        sums: Floats = np.einsum("rc,c->r", self._weights, per_cluster)
        return sums

    def _per_cluster(self, values: Floats) -> Floats:
        sums: Floats = np.zeros(self.num_clusters)
        np.add.at(sums, self._cluster_of, values)
        return sums

    def _estimate(self, value: float, drawn: Floats) -> Estimate:
        if self.num_clusters < 2 or not len(drawn):
            return Estimate(value, math.nan, math.nan)
        tail = (1.0 - self._level) / 2.0
        low, high = np.quantile(drawn, [tail, 1.0 - tail])
        return Estimate(value, float(low), float(high))


def wilson(num_right: int, num: int, *, level: float = DEFAULT_LEVEL, design_effect: float = 1.0) -> Estimate:
    """A single share with Wilson's interval, which stays inside [0, 1] and says something at 0 and at 1.

    `design_effect` divides `num`: questions that share a context count as fewer independent ones.
    """
    if not 0 <= num_right <= num or num == 0:
        raise InvalidRequest("not a share", field="num_right", limit=f"0 … {num}, of at least 1", actual=str(num_right))
    size = num / max(1.0, design_effect)
    share = num_right / num
    z = NormalDist().inv_cdf(0.5 + level / 2.0)
    centre = (share + z * z / (2 * size)) / (1 + z * z / size)
    half = z * math.sqrt(share * (1 - share) / size + z * z / (4 * size * size)) / (1 + z * z / size)
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def difference_high(
    lost: Sequence[bool], gained: Sequence[bool], clusters: Sequence[str], *, level: float = DEFAULT_LEVEL
) -> float:
    """Upper end of the share lost minus the share gained, from Wilson's intervals of both (Newcombe's square-and-add).

    Both take the largest design effect of lost, gained and changed questions: of few alone it comes out too small.
    The two shares are taken as independent. No question is both lost and gained, so they are weakly anticorrelated:
    where both are large the end lies a little low, where losses are rare it does not matter.
    """
    changed = [is_lost or is_gained for is_lost, is_gained in zip(lost, gained, strict=True)]
    effect = max(design_effect(found, clusters) for found in (lost, gained, changed))
    a, b = (wilson(sum(found), len(found), level=level, design_effect=effect) for found in (lost, gained))
    return a.value - b.value + math.hypot(a.high - a.value, b.value - b.low)


def design_effect(right: Sequence[bool], clusters: Sequence[str]) -> float:
    """By how much clustering inflates the variance of a share; at least 1, and 1 where it cannot be estimated."""
    sums: dict[str, list[int]] = {}
    for is_right, cluster in zip(right, clusters, strict=True):
        entry = sums.setdefault(cluster, [0, 0])
        entry[0] += is_right
        entry[1] += 1
    num, share = len(right), sum(right) / len(right)
    if len(sums) < 2 or share in (0.0, 1.0):
        return 1.0
    spread = sum((num_right - share * size) ** 2 for num_right, size in sums.values())
    clustered = len(sums) / (len(sums) - 1) * spread / num**2
    return max(1.0, clustered / (share * (1 - share) / num))


def _draw_weights(num_clusters: int, num_resamples: int, rng: np.random.Generator) -> Floats:
    """How often each resample draws each cluster: [num_resamples, num_clusters], every row sums to num_clusters."""
    drawn = rng.integers(num_clusters, size=(num_resamples, num_clusters))
    drawn += np.arange(num_resamples)[:, None] * num_clusters
    counts = np.bincount(drawn.ravel(), minlength=num_resamples * num_clusters)
    return counts.reshape(num_resamples, num_clusters).astype(np.float64)
