"""A context ready to decode from, and the token after it."""

from __future__ import annotations

from dataclasses import dataclass

from spolia_engine.context import Context


@dataclass(frozen=True, slots=True)
class Prepared:
    """Owns its context until somebody takes it."""

    context: Context
    first_token: int
