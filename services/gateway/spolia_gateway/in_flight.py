"""How much work this gateway has given to each node and not seen end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType


class InFlight:
    """Counts by node id. Published load is up to a heartbeat old; this is not."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    @property
    def counts(self) -> Mapping[str, int]:
        """A live view; nodes without work are absent."""
        return MappingProxyType(self._counts)

    @contextmanager
    def hold(self, node_id: str, amount: int = 1) -> Iterator[None]:
        """Counts `amount` against a node for as long as the block runs, however it ends."""
        self._counts[node_id] += amount
        try:
            yield
        finally:
            self._counts[node_id] -= amount
            if self._counts[node_id] <= 0:
                del self._counts[node_id]
