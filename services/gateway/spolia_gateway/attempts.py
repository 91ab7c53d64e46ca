"""Which nodes a request has been tried on, and whether to try another."""

from __future__ import annotations

from dataclasses import dataclass, field

from spolia_core.errors import Busy, SpoliaError, Unavailable
from spolia_gateway.failures import NodeLost
from spolia_node.deadline import Deadline


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long to go on looking for a node that takes a request.

    `max_attempts` bounds the calls that begin a request and the nodes lost with it, so that a request which kills nodes
    cannot kill them all. `patience_s` bounds the wait for a node to take over an answer that broke off; a client that
    has nothing yet is told at once. `pause_s` is the wait before nodes that refused are asked again, where they gave no
    hint.
    """

    max_attempts: int = 6
    patience_s: float = 10.0
    pause_s: float = 0.2


@dataclass(slots=True)
class Attempts:
    """Calls made for one request. A round ends when every node has been asked once."""

    policy: RetryPolicy
    node_ids: list[str] = field(default_factory=list)
    _this_round: set[str] = field(default_factory=set)
    _num_charged: int = 0
    _num_received: int = 0
    _give_up: Deadline | None = None
    _error: SpoliaError | None = None

    def begin(self, node_id: str) -> None:
        """Counts a call."""
        self.node_ids.append(node_id)
        self._this_round.add(node_id)

    def was_asked(self, node_id: str) -> bool:
        """Whether the node was called in this round."""
        return node_id in self._this_round

    def failed(self, error: SpoliaError, *, refusals_cost: bool = True) -> None:
        """Takes how the last call failed. Lost nodes always count against the limit, refusals when `refusals_cost`.

        Raises what the client is told when there is no use in another call, or none is left.
        """
        if not may_succeed_elsewhere(error):
            raise error
        # "Busy, retry after" tells a client more than "unreachable".
        if not (isinstance(self._error, Busy) and isinstance(error, Unavailable)):
            self._error = error
        self._num_charged += refusals_cost or isinstance(error, NodeLost)
        if self._num_charged >= self.policy.max_attempts:
            raise self._error

    def broke_off(self, num_received: int) -> None:
        """An answer ended early, the client having `num_received` tokens. Patience starts anew when some were new."""
        if self._give_up is None or num_received > self._num_received:
            self._give_up = Deadline.after(self.policy.patience_s)
            self._num_received = num_received

    @property
    def error(self) -> SpoliaError | None:
        """The most telling failure so far."""
        return self._error

    @property
    def out_of_patience(self) -> bool:
        """Whether an answer that broke off has waited long enough for a node."""
        return self._give_up is not None and self._give_up.expired

    def next_round(self) -> None:
        """Lets every node be asked again."""
        self._this_round.clear()

    def pause(self, deadline: Deadline) -> Deadline:
        """When to ask again the nodes that refused; no later than patience and `deadline` allow."""
        hint_s = self._error.retry_after_ms / 1e3 if self._error is not None else 0.0
        left_s = deadline.remaining() if self._give_up is None else min(deadline.remaining(), self._give_up.remaining())
        return Deadline.after(min(hint_s or self.policy.pause_s, left_s))


OF_ONE_NODE = frozenset({"fingerprint", "recipe", "profile"})
"""Fields of errors that speak of the node asked: it changed its model or its profile since it was listed."""


def may_succeed_elsewhere(error: SpoliaError) -> bool:
    """Whether another node may take what this one refused."""
    return error.retryable or error.field in OF_ONE_NODE
