"""Whether rows that read the same keys attend them together: what was measured says so (`sharing_table`)."""

from __future__ import annotations

from typing import Protocol


class Sharing(Protocol):
    """The switch between shared and private treatment. Pure."""

    def __call__(self, num_rows: int, num_tokens: int) -> bool:
        """Whether `num_rows` ≥ 2 rows that read the same `num_tokens` keys attend them in one product."""
        ...


def always_shared(num_rows: int, num_tokens: int) -> bool:
    """Shares whatever can be."""
    return True


def never_shared(num_rows: int, num_tokens: int) -> bool:
    """Every row reads for itself: the private plan."""
    return False
