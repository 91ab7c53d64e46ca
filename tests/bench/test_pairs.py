"""Steps by turns and the interval of their ratio."""

from __future__ import annotations

import random

from spolia_bench.shared.pairs import by_turns, ratio


def test_every_step_runs_in_every_round_and_each_begins_one() -> None:
    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = by_turns(steps, 3, num_steps=2)
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert calls == list("aabbcc" + "bbccaa" + "ccaabb" + "aabbcc")


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    """Of ratios whose true median is 1, drawn from a skewed distribution, 95 of 100 intervals hold it."""
    draw, held = random.Random(0), 0
    for _ in range(2000):
        found = ratio([draw.lognormvariate(0.0, 1.0) for _ in range(15)], [1.0] * 15)
        held += found.low <= 1.0 <= found.high
    assert held >= 0.94 * 2000


def test_few_rounds_give_the_widest_interval() -> None:
    found = ratio([1.0, 2.0, 6.0], [1.0, 1.0, 2.0])
    assert (found.low, found.median, found.high) == (1.0, 2.0, 3.0)
