"""What waits for a reader who is behind.

A step as it came keeps in memory the message that brought it, with the steps of others' answers. Here the steps of each
sample are put together, in memory of their own: the reader gets many tokens at once, and may catch up.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum

from spolia.v1 import common_pb2, decode_pb2
from spolia_core.errors import Cancelled

Step = decode_pb2.DecodeServiceGenerateResponse

MAX_STEP_BYTES = 8 << 10
"""Of steps put together."""
MAX_BACKLOG_BYTES = 4 << 20
"""Of one answer: 14,000 tokens with 20 alternatives each, half a million without."""


class Pace(Enum):
    """How the reader of an answer kept up; a label of the metric."""

    KEPT_UP = "kept_up"
    BEHIND = "behind"
    """It got steps put together."""
    ENDED = "ended"
    """Too much waited for it."""


class ReaderTooSlow(Cancelled):
    """More of an answer waits for its reader than is kept."""


@dataclass(slots=True)
class _Together:
    step: Step
    num_bytes: int

    def take(self, delta: common_pb2.TokenDelta, num_bytes: int) -> bool:
        """Adds what comes right after it; whether there was room, and nothing in between."""
        last = self.step.delta
        follows = delta.token_index == last.token_index + len(
            last.token_ids
        ) and delta.text_offset == last.text_offset + len(last.text)
        if not follows or self.num_bytes + num_bytes > MAX_STEP_BYTES:
            return False
        last.token_ids.extend(delta.token_ids)
        last.text += delta.text
        last.logprobs.extend(delta.logprobs)
        self.num_bytes += num_bytes
        return True


class Backlog:
    """That of one answer. Bounded: in the place of what would be too much stands the error for its reader."""

    def __init__(self) -> None:
        self.items: deque[Step | Exception | None] = deque()
        """In the order of each sample; what ends the answer is last."""
        self.pace = Pace.BEHIND
        self._num_bytes = 0
        self._last: dict[int, _Together] = {}

    def put(self, item: Step | Exception | None) -> None:
        """Adds a step, or what ended the answer."""
        if not isinstance(item, Step):
            self.items.append(item)
            return
        num_bytes = item.ByteSize()
        self._num_bytes += num_bytes
        if self._num_bytes > MAX_BACKLOG_BYTES:
            self._end()
        elif not item.HasField("delta"):
            self.items.append(item)
        elif (last := self._last.get(item.delta.sample_index)) is None or not last.take(item.delta, num_bytes):
            step = Step()
            step.CopyFrom(item)
            self.items.append(step)
            self._last[item.delta.sample_index] = _Together(step, num_bytes)

    def _end(self) -> None:
        self.pace = Pace.ENDED
        self.items.clear()
        self._last.clear()
        message = f"the client reads its answer too slowly: more than {MAX_BACKLOG_BYTES} bytes of it wait"
        self.items.append(ReaderTooSlow(message, limit=f"{MAX_BACKLOG_BYTES} bytes"))
