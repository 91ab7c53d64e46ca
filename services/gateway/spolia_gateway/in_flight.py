"""How much work this gateway has given to each node, or has from each tenant, and not seen end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType


class InFlight:
    """Counts by name. The load that nodes publish is up to a heartbeat old; this is not."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    @property
    def counts(self) -> Mapping[str, int]:
        """A live view; names without work are absent."""
        return MappingProxyType(self._counts)

    @contextmanager
    def hold(self, name: str, amount: int = 1) -> Iterator[None]:
        """Counts `amount` against a name for as long as the block runs, however it ends."""
        self._counts[name] += amount
        try:
            yield
        finally:
            self._counts[name] -= amount
            if self._counts[name] <= 0:
                del self._counts[name]
