"""Steps timed by turns, and the ratio of two with its interval.

A shared machine is not equally fast in every second. So every way takes its step in every round, each round beginning
with another one, and what counts is the ratio within a round: the median over rounds, with the order statistics that
enclose the true median in 95 of 100 runs whatever the distribution.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

Step = Callable[[], object]
Turn = Callable[[], float]
"""Takes its step, wherever that runs, and says how many milliseconds it took."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median of paired ratios, or differences, between `low` and `high` with 95 % confidence."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} … {self.high:.2f})"


def by_turns(steps: Mapping[str, Step], num_rounds: int, *, num_steps: int = 1) -> dict[str, list[float]]:
    """Milliseconds of each step in each round, after one round that does not count.

    `num_steps` in a row are one time.
    """
    return measured_by_turns({name: partial(_mean_ms, step, num_steps) for name, step in steps.items()}, num_rounds)


def measured_by_turns(turns: Mapping[str, Turn], num_rounds: int) -> dict[str, list[float]]:
    """As `by_turns`, of what each turn says it took."""
    names = list(turns)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(num_rounds + 1):
        at = round_number % len(names)
        for name in names[at:] + names[:at]:
            took_ms = turns[name]()
            if round_number:
                times[name].append(took_ms)
    return times


def second_ms(step: Step) -> float:
    """Milliseconds of a step behind another one, which brings back what other work took: caches, and cores awake."""
    step()
    return _mean_ms(step, 1)


def _mean_ms(step: Step, num_steps: int) -> float:
    started = time.perf_counter()
    for _ in range(num_steps):
        step()
    return (time.perf_counter() - started) * 1e3 / num_steps


def ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """Of times of the same rounds."""
    ratios = sorted(a / b for a, b in zip(over, under, strict=True))
    return _median_of(ratios)


def difference(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """As `ratio`, of what times of the same rounds have more than others."""
    return _median_of(sorted(a - b for a, b in zip(over, under, strict=True)))


def _median_of(ordered: Sequence[float]) -> Ratio:
    at = _rank(len(ordered))
    return Ratio(statistics.median(ordered), ordered[at], ordered[-1 - at])


def _rank(count: int) -> int:
    """The largest k for which the median lies outside the k-th smallest … k-th largest (from 0) at most 5 % of the
    time; 0 where no rank is that sure.
    """
    outside, k = 0.0, 0
    while True:
        outside += math.comb(count, k) / 2**count
        if 2 * outside > 0.05 or 2 * k >= count - 1:
            return max(0, k - 1)
        k += 1
