"""What the engine's thread is told about work in steps."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class WorkKind(Enum):
    """What the engine does; the values are label values of metrics."""

    FUNCTION = "function"
    """Anything short that is no job."""
    COMPILE = "compile"
    """A chunk on its own."""
    CONTEXT = "context"
    """A prompt, or what a prefix leaves of it."""
    LINK = "link"
    """A prompt over reused chunks."""


@dataclass(frozen=True, slots=True)
class EngineJob:
    """For whom work in steps is done, and how much of it there is."""

    tenant_id: str
    num_tokens: int
    """Rows it will compute in all."""
    kind: WorkKind = WorkKind.CONTEXT
