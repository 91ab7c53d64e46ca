"""A trace, whichever file it came from."""

from __future__ import annotations

from dataclasses import dataclass

BlockKey = tuple[int, int]
"""Scope and id. Equal keys: the same tokens behind the same tokens. Ids of different scopes share nothing."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. `blocks` are its prompt's blocks, first to last; tokens behind them are its own alone.

    `at_s` counts from the start of the trace. A request of a `session` waits for the one before it in that session, as
    an agent waits for its answer; None: it waits for nobody.
    """

    at_s: float
    num_input_tokens: int
    num_output_tokens: int
    blocks: tuple[BlockKey, ...]
    session: str | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival, in blocks of `block_tokens`. `num_left_out` could not be served at this scale."""

    block_tokens: int
    requests: tuple[TraceRequest, ...]
    num_left_out: int = 0

    def __post_init__(self) -> None:
        assert all(a.at_s <= b.at_s for a, b in zip(self.requests, self.requests[1:], strict=False))
