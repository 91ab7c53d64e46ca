"""Costs follow what was measured, and are unknown where nothing was."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spolia_core.reuse import TokenSource
from spolia_worker.costs import ASSUMED_BYTES_PER_S, FETCH_EXPIRES_S, Comparison, LinearCost, NodeCosts, num_seen_keys


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


positive = st.floats(1e-6, 1e3)


@given(positive, positive, st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=5, max_size=20))
def test_a_line_is_found_again(a: float, b: float, points: list[tuple[int, int]]) -> None:
    cost = LinearCost()
    for x, y in points:
        cost.observe(x, y, a * x + b * y)
    x, y = points[-1]
    found = cost.predict(x, y)
    assert found == pytest.approx(a * x + b * y, rel=1e-3)


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 5000), positive), min_size=1, max_size=20))
def test_no_prediction_is_negative(points: list[tuple[int, int, float]]) -> None:
    cost = LinearCost()
    for x, y, seconds in points:
        cost.observe(x, y, seconds)
    for x, y, _ in [*points, (0, 1, 0.0), (1, 0, 0.0)]:
        found = cost.predict(x, y)
        assert found is not None
        assert found >= 0.0


def test_what_was_never_measured_is_unknown() -> None:
    costs = NodeCosts()
    assert costs.compute_s(10, 10) is None
    assert costs.fetch_s(TokenSource.HOST, 10) is None
    assert costs.compare(TokenSource.HOST, 10, 10) is None
    costs.computed(10, 10, 1.0)
    assert costs.compare(TokenSource.HOST, 10, 10) is None


def test_tiers_are_measured_apart_and_forgotten_when_old() -> None:
    clock = Clock()
    costs = NodeCosts(clock)
    costs.fetched(TokenSource.HOST, 1000, 1.0)
    costs.fetched(TokenSource.DISK, 1000, 10.0)
    assert costs.fetch_s(TokenSource.HOST, 1000) == pytest.approx(1.0)
    assert costs.fetch_s(TokenSource.DISK, 1000) == pytest.approx(10.0)
    clock.now = FETCH_EXPIRES_S + 1
    assert costs.fetch_s(TokenSource.DISK, 1000) is None, "one that was slow is tried again"
    costs.fetched(TokenSource.DISK, 1000, 0.5)
    assert costs.fetch_s(TokenSource.DISK, 1000) == pytest.approx(0.5), "and what it was is forgotten"


def test_costs_follow_a_machine_that_slows_down() -> None:
    costs = NodeCosts()
    for _ in range(50):
        costs.computed(100, 100, 1.0)
    for _ in range(50):
        costs.computed(100, 100, 3.0)
    assert costs.compute_s(100, 100) == pytest.approx(3.0, rel=0.05)


def test_a_fetch_has_to_look_clearly_slower() -> None:
    assert not Comparison(fetch_s=1.2, compute_s=1.0).is_fetch_slower
    assert Comparison(fetch_s=1.6, compute_s=1.0).is_fetch_slower


def test_a_hand_over_is_assumed_until_it_is_measured() -> None:
    costs = NodeCosts()
    assert costs.hand_over_s(1000) == pytest.approx(1000 / ASSUMED_BYTES_PER_S)
    costs.handed_over(1000, 2.0)
    assert costs.hand_over_s(1000) == pytest.approx(2.0)


def test_keys_seen_by_the_rows_at_the_end_of_a_context() -> None:
    assert num_seen_keys(3, 10) == 8 + 9 + 10
    assert num_seen_keys(0, 10) == 0
