"""What is worth keeping: the rank against the sum that it stands for."""

from __future__ import annotations

from math import exp2, log2
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spolia_kvstore.usage import DEFAULT_SECONDS_PER_TOKEN, SAME_USE_S, ComputeCost, Usage, log_cost

HALF_LIFE_S = 100.0
SMALL = settings(max_examples=60, deadline=None, derandomize=True, database=None)
gaps = st.lists(st.floats(1.01 * SAME_USE_S, 500.0), max_size=6)
costs = st.floats(-20.0, 20.0)


def used_at(times: list[float], cost: float = 0.0) -> Usage:
    usage = Usage(times[0], times[0], log_cost=cost)
    for time in times[1:]:
        usage = usage.used(time, HALF_LIFE_S, is_hit=True)
    return usage


def times_of(first: float, gaps: list[float]) -> list[float]:
    times = [first]
    for gap in gaps:
        times.append(times[-1] + gap)
    return times


def value_at(now: float, times: list[float], cost: float) -> float:
    """log2 of the value as the module defines it."""
    return cost + log2(sum(exp2(-(now - time) / HALF_LIFE_S) for time in times))


@SMALL
@given(gaps, costs, st.floats(0.0, 1000.0))
def test_a_rank_is_the_decayed_sum_of_its_uses_times_its_cost(gaps: list[float], cost: float, later: float) -> None:
    times = times_of(10.0, gaps)
    now = times[-1] + later
    rank = used_at(times, cost).rank(HALF_LIFE_S)
    assert rank - now / HALF_LIFE_S == pytest.approx(value_at(now, times, cost), abs=1e-6)


@SMALL
@given(gaps, gaps, costs, st.floats(0.0, 500.0), st.floats(0.0, 1e6))
def test_the_order_of_two_objects_never_changes_while_nobody_uses_them(
    first: list[float], second: list[float], cost: float, delay: float, later: float
) -> None:
    one, other = times_of(0.0, first), times_of(delay, second)
    ranks = used_at(one, cost).rank(HALF_LIFE_S), used_at(other).rank(HALF_LIFE_S)
    soon = max(one[-1], other[-1])
    for now in (soon, soon + min(later, 20 * HALF_LIFE_S)):
        difference = value_at(now, one, cost) - value_at(now, other, 0.0)
        assert ranks[0] - ranks[1] == pytest.approx(difference, abs=1e-6)


def test_a_use_counts_half_after_a_half_life() -> None:
    once_now, twice_before = used_at([HALF_LIFE_S]), used_at([0.0, SAME_USE_S])
    assert once_now.rank(HALF_LIFE_S) == pytest.approx(twice_before.rank(HALF_LIFE_S), abs=0.02)
    assert used_at([HALF_LIFE_S + 5.0]).rank(HALF_LIFE_S) > twice_before.rank(HALF_LIFE_S)


def test_a_lookup_and_the_get_that_follows_are_one_use_and_the_hit_is_counted() -> None:
    stored = Usage(0.0, 0.0)
    looked_up = stored.used(50.0, HALF_LIFE_S, is_hit=False)
    read = looked_up.used(50.0 + 0.9 * SAME_USE_S, HALF_LIFE_S, is_hit=True)
    assert (read.rank(HALF_LIFE_S), read.hits) == (looked_up.rank(HALF_LIFE_S), 1)
    assert read.used(50.0 + SAME_USE_S, HALF_LIFE_S, is_hit=True).rank(HALF_LIFE_S) > read.rank(HALF_LIFE_S)


def test_uses_in_quick_succession_still_count_once_a_second() -> None:
    usage = Usage(0.0, 0.0)
    for step in range(1, 101):
        usage = usage.used(step * 0.1, HALF_LIFE_S, is_hit=True)
    assert usage.hits == 100
    assert 9.0 < exp2(usage.log_uses) < 11.0


def test_a_clock_that_was_set_back_is_no_use_and_no_crash() -> None:
    usage = Usage(100.0, 100.0)
    assert usage.used(40.0, HALF_LIFE_S, is_hit=True).rank(HALF_LIFE_S) == usage.rank(HALF_LIFE_S)


def test_after_a_very_long_time_a_use_is_the_first_one_again() -> None:
    usage = used_at([0.0, 10.0, 20.0]).used(1e9, HALF_LIFE_S, is_hit=True)
    assert usage.log_uses == pytest.approx(0.0, abs=1e-9)


def test_what_costs_twice_as_much_per_byte_is_worth_one_more() -> None:
    base = log_cost(1.0, 8, 1000, 1e-3)
    assert log_cost(2.0, 8, 1000, 1e-3) == pytest.approx(base + 1)
    assert log_cost(1.0, 8, 500, 1e-3) == pytest.approx(base + 1)


def test_a_cost_that_nobody_measured_comes_from_the_tokens() -> None:
    assert log_cost(0.0, 100, 1000, 2e-3) == pytest.approx(log_cost(0.2, 1, 1000, 1.0))


def test_a_deeper_prefix_chunk_is_worth_less_among_equals_and_more_than_one_used_less() -> None:
    shallow, deep = (log_cost(1.0, 128, 1000, 1e-3, num_before) for num_before in (3, 4))
    assert deep < shallow
    usage = Usage(0.0, 0.0, log_cost=log_cost(1.0, 128, 1000, 1e-3, 100))
    assert usage.used(10.0, HALF_LIFE_S, is_hit=True).rank(HALF_LIFE_S) > Usage(0.0, 0.0, log_cost=shallow).rank(
        HALF_LIFE_S
    )


def test_the_cost_of_a_token_is_the_mean_of_what_was_measured_and_follows_change() -> None:
    cost = ComputeCost()
    assert cost.seconds_per_token == DEFAULT_SECONDS_PER_TOKEN
    for compute_s, num_tokens in ((0.0, 10), (1.0, 0)):
        cost.observe(compute_s, num_tokens)
    assert cost.seconds_per_token == DEFAULT_SECONDS_PER_TOKEN, "that was no measurement"
    for seconds in (1.0, 2.0, 6.0):
        cost.observe(seconds * 10, 10)
    assert cost.seconds_per_token == pytest.approx(mean((1.0, 2.0, 6.0)))
    for _ in range(200):
        cost.observe(0.5, 10)
    assert cost.seconds_per_token == pytest.approx(0.05, rel=0.01)
