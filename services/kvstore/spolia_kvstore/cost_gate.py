"""Whether reading an object from a tier is worth it: what it costs there, as measured, against computing it again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from spolia_kvstore.objects import ObjectRecord, Tier

MIN_SAMPLES = 3
"""Reads before a measurement counts."""

REMEASURE_AFTER_S = 30.0
"""A tier that nobody has read for so long is tried again: what made it slow may be over."""

NEW_WEIGHT = 0.2


@dataclass(slots=True)
class TierSpeed:
    """Reads of a tier so far, as seconds per byte, recent ones weighing more."""

    seconds_per_byte: float = 0.0
    num_samples: int = 0
    measured_at: float = float("-inf")

    @property
    def bytes_per_s(self) -> float:
        """Measured speed; 0 before the first read."""
        return 1 / self.seconds_per_byte if self.seconds_per_byte > 0 else 0.0


class CostGate:
    """Speeds of all tiers. With `enabled` false nothing is skipped, and speeds are measured all the same."""

    def __init__(self, *, enabled: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self.enabled = enabled
        self._clock = clock
        self.speeds = {tier: TierSpeed() for tier in Tier}

    def observe(self, tier: Tier, num_bytes: int, seconds: float) -> None:
        """Takes one read in: what it took to have these bytes in memory and checked."""
        if num_bytes <= 0:
            return
        now, speed = self._clock(), self.speeds[tier]
        if now - speed.measured_at >= REMEASURE_AFTER_S:
            speed = self.speeds[tier] = TierSpeed()  # begins anew: what was slow then says nothing of now
        weight = max(NEW_WEIGHT, 1 / (speed.num_samples + 1))
        speed.seconds_per_byte += weight * (seconds / num_bytes - speed.seconds_per_byte)
        speed.num_samples += 1
        speed.measured_at = now

    def skips(self, record: ObjectRecord, tier: Tier) -> bool:
        """Whether computing the object is measured to be faster than reading it there. Unknown costs skip nothing."""
        speed = self.speeds[tier]
        is_known = speed.num_samples >= MIN_SAMPLES and self._clock() - speed.measured_at < REMEASURE_AFTER_S
        if not (self.enabled and is_known and record.compute_s > 0):
            return False
        return speed.seconds_per_byte * record.size_bytes > record.compute_s
