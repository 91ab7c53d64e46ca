"""What an object is worth keeping: its recompute cost per byte × recency × reuse.

    value(now) = cost per byte · Σ over its uses of 2^(−(now − t_use) / half_life)

Recency and reuse are one sum (LRFU: Lee et al., "LRFU: a spectrum of policies", IEEE ToC 2001); cost per byte weighs
it, as in GreedyDual-Size. All values decay at one rate, so their order changes only when one is used, and its base-2
log can be kept as one number:

    rank = log2(cost per byte) + log2(decayed uses at t_last) + t_last / half_life

The lowest rank is evicted first. Ranks of one half-life compare across objects, tiers and restarts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp2, log2

SAME_USE_S = 1.0
"""A Lookup and the Get that follows it are one use."""

DEFAULT_SECONDS_PER_TOKEN = 1e-3
"""What computing a token is taken to cost until a node has said: it only orders objects of different length."""

DEPTH_STEP = 1e-3
"""Rank that a prefix chunk loses per chunk before it: of no use without those, it goes first among equals."""


@dataclass(frozen=True, slots=True)
class Usage:
    """How an object was used. Times are seconds since the epoch; `log_uses`: log2 of its uses decayed to `used_at`."""

    stored_at: float
    used_at: float
    log_uses: float = 0.0
    hits: int = 0
    log_cost: float = 0.0

    def used(self, now: float, half_life_s: float, *, is_hit: bool) -> Usage:
        """After one more use. `is_hit`: its bytes were read."""
        hits = self.hits + is_hit
        age = max(0.0, now - self.used_at)
        if age < SAME_USE_S:
            return Usage(self.stored_at, self.used_at, self.log_uses, hits, self.log_cost)
        decayed = exp2(max(-64.0, self.log_uses - age / half_life_s))
        return Usage(self.stored_at, now, log2(1.0 + decayed), hits, self.log_cost)

    def rank(self, half_life_s: float) -> float:
        """What to order by: the lowest is worth least."""
        return self.log_cost + self.log_uses + self.used_at / half_life_s


def log_cost(
    compute_s: float, num_tokens: int, size_bytes: int, seconds_per_token: float, num_before: int = 0
) -> float:
    """log2 of recompute cost per byte. `compute_s` 0: taken from the tokens. `num_before`: prefix chunks before it."""
    cost = compute_s if compute_s > 0 else max(1, num_tokens) * seconds_per_token
    return log2(cost / max(1, size_bytes)) - DEPTH_STEP * num_before


class ComputeCost:
    """Mean seconds per token over the objects whose computation was measured, recent ones weighing more."""

    def __init__(self) -> None:
        self.seconds_per_token = DEFAULT_SECONDS_PER_TOKEN
        self._num_seen = 0

    def observe(self, compute_s: float, num_tokens: int) -> None:
        """Takes one measurement in; those of 0 are none."""
        if compute_s > 0 and num_tokens > 0:
            self._num_seen += 1
            weight = max(1 / self._num_seen, 0.05)
            self.seconds_per_token += weight * (compute_s / num_tokens - self.seconds_per_token)
