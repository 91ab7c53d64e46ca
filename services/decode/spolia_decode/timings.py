"""Times of a request on its decode node."""

from __future__ import annotations

import time

from spolia.v1.common_pb2 import Timings


class RequestTimes:
    """Measures from its making, the arrival of the request, on the monotonic clock."""

    def __init__(self) -> None:
        self._arrived_s = time.monotonic()
        self._queue_ms = 0.0
        self._compute_ms = 0.0
        self._ttft_ms: float | None = None

    def work_began(self) -> None:
        """The request has its place."""
        self._queue_ms = self._since_arrival_ms()

    def computed(self, seconds: float) -> None:
        """What an engine took for the context."""
        self._compute_ms = seconds * 1000

    def token_came(self) -> None:
        """A token is there; only the first counts."""
        if self._ttft_ms is None:
            self._ttft_ms = self._since_arrival_ms()

    def so_far(self) -> Timings:
        """What goes into the finish message, the last token being now."""
        return Timings(
            queue_ms=self._queue_ms,
            ttft_ms=self._ttft_ms or 0.0,
            e2e_ms=self._since_arrival_ms(),
            compute_ms=self._compute_ms,
        )

    def _since_arrival_ms(self) -> float:
        return (time.monotonic() - self._arrived_s) * 1000
