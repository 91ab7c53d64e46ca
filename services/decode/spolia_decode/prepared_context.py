"""A context ready to decode from."""

from __future__ import annotations

from dataclasses import dataclass

from spolia_decode.continuation import Continuation
from spolia_engine.context import Context


@dataclass(frozen=True, slots=True)
class PreparedContext:
    """Owns its context until somebody takes it."""

    context: Context
    continuation: Continuation | None = None
    """What the answer may complete; None where nothing of it is to be kept."""
    compute_s: float = 0.0
    """What an engine took for it, here or on the node that handed it over."""
    seconds_per_token: float = 0.0
    """What computing a token of the context took, on whichever node; 0 where that was not measured."""
