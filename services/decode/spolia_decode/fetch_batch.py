"""What fetches that run at once take together."""

from __future__ import annotations

import time


class FetchBatch:
    """Fetches from one tier that run at once: what they take is measured together, where it is measured."""

    def __init__(self, *, is_measured: bool) -> None:
        self._is_measured = is_measured
        self._is_spoilt = False
        self._began_at = 0.0
        self._num_open = 0
        self.num_bytes = 0

    def begin(self) -> None:
        """One more."""
        if self._num_open == 0:
            self._began_at, self.num_bytes, self._is_spoilt = time.monotonic(), 0, False
        self._num_open += 1

    def spoil(self) -> None:
        """One of them broke off: its time is in the measurement, its bytes are not."""
        self._is_spoilt = True

    def end(self) -> float | None:
        """One less; how long all of them took, when it was the last and that says something."""
        self._num_open -= 1
        says_something = self._is_measured and not self._is_spoilt and self.num_bytes > 0
        return time.monotonic() - self._began_at if says_something and not self._num_open else None
