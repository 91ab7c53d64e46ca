"""What the engine's thread is told about work in steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineJob:
    """For whom work in steps is done, and how much of it there is."""

    tenant_id: str
    num_tokens: int
    """Rows it will compute in all."""
