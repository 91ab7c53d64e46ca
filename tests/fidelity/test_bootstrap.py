"""Intervals cover what they say, and widen where questions hang together."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from spolia_core.errors import InvalidRequest
from spolia_fidelity.bootstrap import ClusterBootstrap, design_effect, difference_high, wilson
from spolia_fidelity.figures import figures_of
from spolia_fidelity.measures import Outcome

FIGURE = 0.3
"""The true mean of every simulated world."""


def simulated(rng: np.random.Generator, num_clusters: int, shared: float) -> tuple[list[str], np.ndarray]:
    """Clusters of 2-6 rows whose values share `shared` of their spread; mean `FIGURE`."""
    sizes = rng.integers(2, 7, size=num_clusters)
    clusters = [f"c{i}" for i, size in enumerate(sizes) for _ in range(size)]
    common = np.repeat(rng.normal(size=num_clusters), sizes) * math.sqrt(shared)
    own = rng.normal(size=len(clusters)) * math.sqrt(1 - shared)
    return clusters, FIGURE + common + own


@pytest.mark.parametrize("shared", [0.0, 0.7])
def test_nominal_95_percent_intervals_cover_the_truth_about_that_often(shared: float) -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for seed in range(200):
        clusters, values = simulated(rng, 60, shared)
        found = ClusterBootstrap(clusters, seed=seed, num_resamples=400).mean(values)
        covered += found.low <= FIGURE <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def test_ignoring_clusters_that_hang_together_would_cover_far_less() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for seed in range(200):
        _, values = simulated(rng, 60, 0.7)
        alone = [str(i) for i in range(len(values))]
        found = ClusterBootstrap(alone, seed=seed, num_resamples=400).mean(values)
        covered += found.low <= FIGURE <= found.high
    assert covered / 200 < 0.90


def test_correlation_inside_clusters_widens_the_interval() -> None:
    rng = np.random.default_rng(0)
    clusters, values = simulated(rng, 80, 0.9)
    together = ClusterBootstrap(clusters, seed=1).mean(values)
    apart = ClusterBootstrap([str(i) for i in range(len(values))], seed=1).mean(values)
    assert together.value == pytest.approx(apart.value)
    assert together.high - together.low > 1.5 * (apart.high - apart.low)


def test_no_difference_anywhere_gives_exactly_zero() -> None:
    bootstrap = ClusterBootstrap([f"c{i // 3}" for i in range(30)], seed=0)
    found = bootstrap.ratio(np.zeros(30), np.full(30, 7.0))
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_a_seed_fixes_the_interval_and_the_global_generator_has_no_part_in_it() -> None:
    clusters, values = simulated(np.random.default_rng(2), 30, 0.3)
    np.random.seed(1)
    first = ClusterBootstrap(clusters, seed=9).mean(values)
    np.random.seed(2)
    assert ClusterBootstrap(clusters, seed=9).mean(values) == first
    assert ClusterBootstrap(clusters, seed=10).mean(values) != first


def test_a_ratio_is_of_sums_so_long_answers_weigh_more() -> None:
    found = ClusterBootstrap(["a", "b"], seed=0).ratio(np.array([10.0, 1.0]), np.array([100.0, 1.0]))
    assert found.value == pytest.approx(11 / 101)
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(1.0))


def test_percentiles_equal_the_slow_way_of_repeating_and_sorting() -> None:
    rng = np.random.default_rng(4)
    num_rows = 37
    clusters = [f"c{i // 4}" for i in range(num_rows)]
    rows = np.sort(rng.integers(num_rows, size=301))
    rows[:num_rows] = np.arange(num_rows)  # every row has a value
    values = rng.exponential(size=301)
    bootstrap = ClusterBootstrap(clusters, seed=6, num_resamples=100)
    for percent in (50, 90, 99):
        drawn = []
        for weights in bootstrap._weights.astype(int):
            repeats = [weights[int(clusters[row][1:])] for row in rows]
            ordered = np.sort(np.repeat(values, repeats))
            drawn.append(ordered[math.ceil(len(ordered) * percent / 100) - 1])
        found = bootstrap.percentile(values, rows, percent)
        assert found.value == np.sort(values)[math.ceil(301 * percent / 100) - 1]
        assert (found.low, found.high) == tuple(np.quantile(drawn, [0.025, 0.975]))


def test_one_cluster_has_no_interval_and_bounds_are_not_claimed_on_it() -> None:
    found = ClusterBootstrap(["a", "a", "a"], seed=0).mean(np.array([1.0, 2.0, 3.0]))
    assert found.value == 2.0
    assert not found.has_interval
    assert not found.high <= 1e9


@pytest.mark.parametrize(
    ("arguments", "field"),
    [({"num_resamples": 99}, "num_resamples"), ({"level": 1.0}, "level"), ({"clusters": []}, "clusters")],
)
def test_what_makes_no_interval_is_refused(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ClusterBootstrap(**{"clusters": ["a", "b"], "seed": 0, **arguments})  # type: ignore[arg-type]  # wrong on purpose
    assert caught.value.field == field


def test_wilson_agrees_with_the_published_example_and_stays_inside_the_unit() -> None:
    # Newcombe (Statistics in Medicine 17, 1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for num_right, num, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        found = wilson(num_right, num)
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    assert wilson(20, 20).high == 1.0
    assert wilson(20, 20).low < 0.9
    with pytest.raises(InvalidRequest):
        wilson(0, 0)


def test_a_design_effect_is_the_cluster_size_where_clusters_answer_as_one() -> None:
    clusters = [f"c{i // 5}" for i in range(500)]
    as_one = [(i // 5) % 2 == 0 for i in range(500)]
    assert design_effect(as_one, clusters) == pytest.approx(5, rel=0.02)
    assert design_effect([True] * 500, clusters) == 1.0
    alternating = [i % 2 == 0 for i in range(500)]
    assert design_effect(alternating, clusters) == 1.0
    assert wilson(250, 500, design_effect=5.0).low == pytest.approx(wilson(50, 100).low)


def test_the_difference_of_two_shares_ends_where_square_and_add_of_wilson_ends() -> None:
    for a, b, num in [(7, 2, 700), (0, 0, 10), (10, 0, 10), (3, 5, 400)]:
        lost, gained = [i < a for i in range(num)], [num - b <= i for i in range(num)]
        x, y = wilson(a, num), wilson(b, num)
        expected = (a - b) / num + math.sqrt((x.high - a / num) ** 2 + (b / num - y.low) ** 2)
        assert difference_high(lost, gained, [str(i) for i in range(num)]) == pytest.approx(expected, rel=5e-3)
    assert difference_high([False] * 10, [False] * 10, list("abcdefghij")) == pytest.approx(0.2775, abs=5e-5)


def test_losses_that_hang_together_raise_the_upper_end_of_their_difference() -> None:
    lost, gained = [i < 20 for i in range(1000)], [i >= 990 for i in range(1000)]
    alone = difference_high(lost, gained, [str(i) for i in range(1000)])
    in_fives = difference_high(lost, gained, [str(i // 5) for i in range(1000)])
    assert in_fives - 0.01 > 1.8 * (alone - 0.01)


def test_a_bounded_ratio_without_spread_is_the_plain_one_and_with_too_little_has_no_upper_end() -> None:
    bootstrap = ClusterBootstrap([str(i) for i in range(20)], seed=0)
    tokens = np.full(20, 5.0)
    assert bootstrap.bounded_ratio(np.zeros(20), tokens) == bootstrap.ratio(np.zeros(20), tokens)
    one_of_twenty = np.where(np.arange(20) == 7, 1.0, 0.0)  # a third of the resamples do not hold it
    assert bootstrap.bounded_ratio(one_of_twenty, tokens).high == math.inf
    alone = ClusterBootstrap(["a", "a"], seed=0).bounded_ratio(np.ones(2), np.ones(2))
    assert not alone.has_interval


def many_outcomes(num: int, shift: float, *, clusters: int) -> list[Outcome]:
    rng = np.random.default_rng(int(shift * 1000))
    return [
        Outcome(
            case=f"c{i % clusters}",
            cluster=f"c{i % clusters}",
            index=i // clusters,
            task=("fact", "cut", "pronoun", "two_hop")[i % 4],
            nll_sum=float(rng.random() + shift),
            num_tokens=5,
            kls=tuple((rng.random(5) * shift).tolist()),
            num_agreed=4,
            exact=bool(rng.random() > 0.1 + shift),
        )
        for i in range(num)
    ]


def test_two_thousand_questions_under_six_policies_take_less_than_two_seconds_of_one_core() -> None:
    shifts = {"full": 0.0, "naive": 0.2, "link:4": 0.1, "link:16": 0.05, "link:32": 0.02, "cacheblend:0.16": 0.01}
    outcomes = {name: many_outcomes(2_000, shift, clusters=500) for name, shift in shifts.items()}
    begin = time.process_time()  # not the wall's: other work may run beside the tests
    figures_of(outcomes, seed=1)
    assert time.process_time() - begin < 2.0
