"""What things cost on this node, as measured while they were done: computing rows, and fetching chunks by tier.

Both are straight lines. A pass over R rows that attend to N keys in all takes a·R for its matrix products and b·N for
its attention; a fetch takes a fixed time and one per byte. The lines are fitted to what was seen last, so they follow a
machine that slows down or a network that recovers. What was never measured has no cost: it is done once, and measured.

Of a pass that several shared each has its share, which is less than it would take alone. That is meant: what is asked
for is what computing takes of the engine now, in the company it has now. The pass itself ends no sooner.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from spolia_core.reuse import TokenSource

DECAY = 0.9
"""Weight of an observation against the next one: about the last ten count."""
GATE_MARGIN = 1.5
"""How much slower a fetch has to look than computing: times vary by tens of percent, and what computes keeps the engine
from others while a fetch does not."""
ASSUMED_BYTES_PER_S = 2e8
"""Of live KV, before any was measured: below what a gRPC stream gives on one machine."""
FETCH_EXPIRES_S = 30.0
"""After so long without a fetch from a tier its cost is unknown again: one that was slow may have recovered."""


class LinearCost:
    """seconds = a·x + b·y with a, b ≥ 0: least squares over decaying observations."""

    def __init__(self) -> None:
        self._xx = self._xy = self._yy = self._xs = self._ys = 0.0

    def observe(self, x: float, y: float, seconds: float) -> None:
        """Takes a measurement. `x` and `y` are not negative, and not both zero."""
        self._xx = self._xx * DECAY + x * x
        self._xy = self._xy * DECAY + x * y
        self._yy = self._yy * DECAY + y * y
        self._xs = self._xs * DECAY + x * seconds
        self._ys = self._ys * DECAY + y * seconds

    def predict(self, x: float, y: float) -> float | None:
        """Seconds; None before the first observation."""
        if self._xx == 0.0 and self._yy == 0.0:
            return None
        a, b = self._coefficients()
        return a * x + b * y

    def _coefficients(self) -> tuple[float, float]:
        determinant = self._xx * self._yy - self._xy * self._xy
        if determinant > 1e-9 * self._xx * self._yy:
            a = (self._xs * self._yy - self._ys * self._xy) / determinant
            b = (self._ys * self._xx - self._xs * self._xy) / determinant
            if a >= 0.0 and b >= 0.0:
                return a, b
            # The better of the two lines through one axis.
            return (0.0, self._ys / self._yy) if a < 0.0 else (self._xs / self._xx, 0.0)
        # Everything seen so far was alike in proportion: the larger share of the two explains it.
        return (self._xs / self._xx, 0.0) if self._xx >= self._yy else (0.0, self._ys / self._yy)


def num_seen_keys(num_rows: int, num_context_tokens: int) -> int:
    """Keys that the rows of a pass attend to, added up: rows at the end of a context of so many tokens."""
    return num_rows * num_context_tokens - num_rows * (num_rows - 1) // 2


@dataclass(frozen=True, slots=True)
class Comparison:
    """What fetching and computing are expected to take, in seconds."""

    fetch_s: float
    compute_s: float

    @property
    def is_fetch_slower(self) -> bool:
        """Whether the chunk had better be computed."""
        return self.fetch_s > GATE_MARGIN * self.compute_s


class NodeCosts:
    """The costs of one node. Used from its event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._compute = LinearCost()
        self._fetch: dict[TokenSource, LinearCost] = {}
        self._fetched_at: dict[TokenSource, float] = {}

    def computed(self, num_rows: int, num_context_tokens: int, seconds: float) -> None:
        """A pass of so many rows at the end of a context took the engine so long."""
        if num_rows > 0:
            self._compute.observe(num_rows, num_seen_keys(num_rows, num_context_tokens), seconds)

    def fetched(self, source: TokenSource, num_bytes: int, seconds: float) -> None:
        """Chunks came from a tier: `num_bytes` in `seconds`, waiting included. What has expired is forgotten."""
        if self._has_expired(source):
            self._fetch[source] = LinearCost()
        self._fetch[source].observe(1.0, num_bytes, seconds)
        self._fetched_at[source] = self._clock()

    def compute_s(self, num_rows: int, num_context_tokens: int) -> float | None:
        """What such a pass would take now; None when none was measured."""
        return self._compute.predict(num_rows, num_seen_keys(num_rows, num_context_tokens))

    def fetch_s(self, source: TokenSource, num_bytes: int) -> float | None:
        """What such a fetch would take now; None when none was measured lately."""
        return None if self._has_expired(source) else self._fetch[source].predict(1.0, num_bytes)

    def _has_expired(self, source: TokenSource) -> bool:
        return source not in self._fetch or self._clock() - self._fetched_at[source] > FETCH_EXPIRES_S

    def handed_over(self, num_bytes: int, seconds: float) -> None:
        """Live KV came from another node: `num_bytes` in `seconds`, its computation not counted."""
        self.fetched(TokenSource.PEER, num_bytes, seconds)

    def hand_over_s(self, num_bytes: int) -> float:
        """What it would take for so much live KV to come; by `ASSUMED_BYTES_PER_S` while nothing was measured."""
        seconds = self.fetch_s(TokenSource.PEER, num_bytes)
        return num_bytes / ASSUMED_BYTES_PER_S if seconds is None else seconds

    def compare(self, source: TokenSource, num_bytes: int, num_tokens: int) -> Comparison | None:
        """Fetching a local chunk against computing it; None where either is unknown."""
        fetch_s, compute_s = self.fetch_s(source, num_bytes), self.compute_s(num_tokens, num_tokens)
        return None if fetch_s is None or compute_s is None else Comparison(fetch_s, compute_s)
