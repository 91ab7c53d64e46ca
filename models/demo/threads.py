"""How many threads a step uses on a machine shared with others."""

from __future__ import annotations

import time

import torch


class ThreadCount:
    """Falls back to one thread for some steps whenever threads got clearly less processor time than passed.

    A product split over two cores waits for the slower one, so with one core taken two are slower than one.
    """

    _PATIENCE = 12

    def __init__(self, most: int) -> None:
        self._most = most
        self._alone_for = 0
        torch.set_num_threads(most)
        self._wall, self._processor = time.monotonic(), time.process_time()

    def update(self) -> None:
        """Call after every step."""
        wall, processor = time.monotonic(), time.process_time()
        share = (processor - self._processor) / max(wall - self._wall, 1e-9)
        self._wall, self._processor = wall, processor
        if self._alone_for:
            self._alone_for -= 1
        elif share < 0.75 * self._most:
            self._alone_for = self._PATIENCE
        torch.set_num_threads(1 if self._alone_for else self._most)
