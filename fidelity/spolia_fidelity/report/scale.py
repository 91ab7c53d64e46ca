"""Axes: values to pixels, and where the ticks stand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, takewhile


@dataclass(frozen=True, slots=True)
class LossScale:
    """Linear up to `bound` on both sides of zero, logarithmic beyond: a loss near the bound and one far past it both
    show. `top` and `bottom` are the pixels of the largest and the smallest value."""

    bound: float
    smallest: float
    largest: float
    top: float
    bottom: float

    @classmethod
    def over(cls, values: Sequence[float], bound: float, top: float, bottom: float) -> LossScale:
        """A scale that holds zero, both bounds and every finite value, and ends at ticks."""
        finite = [value for value in values if math.isfinite(value)]
        smallest = -_tick_beyond(-min([*finite, -bound]), bound)
        return cls(bound, smallest, _tick_beyond(max([*finite, bound]), bound), top, bottom)

    def y(self, value: float) -> float:
        """Pixel of a value."""
        low, high = self._bent(self.smallest), self._bent(self.largest)
        return self.bottom - (self._bent(value) - low) / (high - low) * (self.bottom - self.top)

    def ticks(self) -> list[float]:
        """Zero and ± the bound times 1, 3, 10, 30, …, as far as the scale goes."""
        up = _ticks(self.bound, self.largest)
        down = [-tick for tick in _ticks(self.bound, -self.smallest)]
        return [*reversed(down), 0.0, *up]

    def _bent(self, value: float) -> float:
        part = abs(value) / self.bound
        return math.copysign(part if part <= 1 else 1 + math.log(part), value)


def share_ticks(largest: float) -> list[float]:
    """Even shares from 0 to at least `largest`, four to eight of them; 1 at most."""
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2) if largest <= step * 7 or step == 0.2)
    return [index * step for index in range(max(1, math.ceil(round(largest / step, 9))) + 1)]


def _ticks(bound: float, largest: float) -> list[float]:
    return list(takewhile(lambda tick: tick <= largest * (1 + 1e-9), _all_ticks(bound)))


def _tick_beyond(value: float, bound: float) -> float:
    """The first tick at or past `value`."""
    return next(tick for tick in _all_ticks(bound) if tick >= value * (1 - 1e-9))


def _all_ticks(bound: float) -> Iterator[float]:
    """The bound times 1, 3, 10, 30, … without end."""
    for power in count():
        yield bound * float(10**power)
        yield bound * 3.0 * float(10**power)
