"""What a gateway served lately: the figures people look at, over a window that moves."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from spolia.v1.directory_pb2 import ServingFigures

WINDOW_S = 60
SLOT_S = 5
"""The window moves by so much at a time."""

MAX_TIMES = 512
"""Times kept of a kind in a slot: the latest."""


@dataclass(slots=True)
class _Slot:
    began_s: float
    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    first_token_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_TIMES))
    inter_token_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_TIMES))


class RecentServing:
    """Counts and times of the last minute. One event loop's; `now` in monotonic seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._began_s = now()
        self._slots: deque[_Slot] = deque()

    def first_token(self, seconds: float) -> None:
        """A request's first token was passed on, so long after it arrived."""
        self._slot().first_token_s.append(seconds)

    def next_token(self, seconds: float) -> None:
        """A later one was, so long after the one before."""
        self._slot().inter_token_s.append(seconds)

    def finished(self, num_prompt_tokens: int, num_cached_tokens: int, num_generated_tokens: int) -> None:
        """A request came to its finish."""
        slot = self._slot()
        slot.num_requests += 1
        slot.num_prompt_tokens += num_prompt_tokens
        slot.num_cached_tokens += num_cached_tokens
        slot.num_generated_tokens += num_generated_tokens

    def figures(self) -> ServingFigures:
        """The window as it stands."""
        self._forget()
        slots = self._slots
        first = sorted(seconds for slot in slots for seconds in slot.first_token_s)
        between = sorted(seconds for slot in slots for seconds in slot.inter_token_s)
        return ServingFigures(
            window_s=round(min(WINDOW_S, max(1.0, self._now() - self._began_s))),
            num_requests=sum(slot.num_requests for slot in slots),
            num_prompt_tokens=sum(slot.num_prompt_tokens for slot in slots),
            num_cached_tokens=sum(slot.num_cached_tokens for slot in slots),
            num_generated_tokens=sum(slot.num_generated_tokens for slot in slots),
            ttft_p50_ms=_percentile_ms(first, 0.5),
            ttft_p95_ms=_percentile_ms(first, 0.95),
            itl_p50_ms=_percentile_ms(between, 0.5),
            itl_p95_ms=_percentile_ms(between, 0.95),
        )

    def _slot(self) -> _Slot:
        """The one that is filled now."""
        now = self._now()
        if not self._slots or now - self._slots[-1].began_s >= SLOT_S:
            self._slots.append(_Slot(now))
            self._forget()
        return self._slots[-1]

    def _forget(self) -> None:
        too_old = self._now() - WINDOW_S
        while self._slots and self._slots[0].began_s <= too_old:
            self._slots.popleft()


def _percentile_ms(ordered: Sequence[float], share: float) -> float:
    """The smallest time that so many are no longer than; 0 where there are none."""
    if not ordered:
        return 0.0
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000, 3)
