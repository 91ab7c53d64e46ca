"""What a client has been given of an answer: the point a replay continues from."""

from __future__ import annotations

from dataclasses import dataclass, field

from spolia.v1 import common_pb2, decode_pb2
from spolia_core.errors import InternalError


@dataclass(slots=True)
class Received:
    """Ids and text of one answer, over all the nodes that worked on it.

    Ids run ahead of text: a replay resends the ids, and the node that takes over derives again the text held back.
    """

    token_ids: list[int] = field(default_factory=list)
    num_code_points: int = 0

    @property
    def empty(self) -> bool:
        """Whether the client has nothing yet; then a retry is no replay."""
        return not self.token_ids

    def take(self, delta: common_pb2.TokenDelta) -> None:
        """Counts a delta in, before it goes to the client.

        Raises `InternalError` when it does not continue exactly where the last one ended: a token lost or doubled is
        never passed on.
        """
        if delta.token_ids:
            _check_continues(delta.token_index, len(self.token_ids), "token")
            self.token_ids.extend(delta.token_ids)
        if delta.text:
            _check_continues(delta.text_offset, self.num_code_points, "code point")
            self.num_code_points += len(delta.text)

    def check_complete(self, finish: common_pb2.Finish) -> None:
        """Raises `InternalError` when a finish counts other tokens than were received."""
        _check_continues(finish.num_generated_tokens, len(self.token_ids), "token")

    def resume(self) -> decode_pb2.Resume | None:
        """What the next node must be told; None when it starts afresh."""
        if self.empty:
            return None
        return decode_pb2.Resume(token_ids=self.token_ids, num_text_code_points=self.num_code_points)


def _check_continues(given: int, expected: int, what: str) -> None:
    if given != expected:
        raise InternalError(
            f"the decode node's answer goes on at {what} {given} where {expected} was due",
            field="delta",
            limit=str(expected),
            actual=str(given),
        )
