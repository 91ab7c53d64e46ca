"""A measured number with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and the ends of its interval, in the figure's own unit.

    `low` and `high` are NaN where the data hold no interval (fewer than two independent clusters). Every comparison
    with NaN is false, so "`high` is within the bound" is not claimed then.
    """

    value: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        """Whether the data were enough for an interval."""
        return not (math.isnan(self.low) or math.isnan(self.high))

    def scaled(self, factor: float) -> Estimate:
        """The same figure in another unit. A negative factor swaps the ends."""
        low, high = self.low * factor, self.high * factor
        if factor < 0:
            low, high = high, low
        return Estimate(self.value * factor + 0.0, low + 0.0, high + 0.0)  # + 0.0: no negative zero
