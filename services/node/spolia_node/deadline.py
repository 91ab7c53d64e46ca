"""A point in time by which work must be done, on the monotonic clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from spolia_core.errors import DeadlineExceeded

T = TypeVar("T")


class HasTimeRemaining(Protocol):
    """The part of a gRPC context that knows the caller's deadline."""

    def time_remaining(self) -> float | None:
        """Seconds left, or None when the caller set no deadline."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """When to give up. Passed down a call chain, so that every wait is taken from what is left of the caller's."""

    at: float
    """Seconds on `time.monotonic()`; means nothing on another machine."""

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """A deadline `seconds` from now."""
        return cls(time.monotonic() + seconds)

    @classmethod
    def of(cls, context: HasTimeRemaining, default_s: float) -> Deadline:
        """What is left of the caller's deadline; `default_s` from now when the caller set none."""
        left = context.time_remaining()
        return cls.after(default_s if left is None else left)

    def remaining(self) -> float:
        """Seconds left, never negative: fit for a timeout."""
        return max(0.0, self.at - time.monotonic())

    @property
    def expired(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() >= self.at

    def share(self, fraction: float) -> Deadline:
        """A nearer deadline: `fraction` (0 … 1) of what is left now. For a step that must leave time for others."""
        return Deadline.after(self.remaining() * fraction)

    def check(self, what: str = "the request") -> None:
        """Raises `DeadlineExceeded`, naming `what`, when no time is left."""
        if self.expired:
            raise DeadlineExceeded(f"{what} ran out of time")

    async def wait(self, awaitable: Awaitable[T], what: str) -> T:
        """The result of `awaitable`, cancelled at the deadline: then raises `DeadlineExceeded`, naming `what`."""
        limit = asyncio.timeout(self.remaining())
        try:
            async with limit:
                return await awaitable
        except TimeoutError:
            # A TimeoutError of the work itself is not ours to rename.
            if not limit.expired():
                raise
            raise DeadlineExceeded(f"{what} ran out of time") from None
