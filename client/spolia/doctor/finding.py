"""What one check found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class State(Enum):
    """How it went."""

    OK = "ok"
    WARNING = "warning"
    """Works, and somebody should look at it; or could not be told."""
    FAILED = "failed"
    SKIPPED = "skipped"
    """Not looked at; the finding says what it would take."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a report; `facts` are the figures behind it."""

    check: str
    state: State
    said: str
    facts: Mapping[str, object] = field(default_factory=dict)
