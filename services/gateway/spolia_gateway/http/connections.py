"""Connections of HTTP clients: how many there may be, and which gives way to a new one."""

from __future__ import annotations

import time
from collections import OrderedDict
from enum import Enum
from typing import Protocol

from spolia_node.logs import get_log
from spolia_node.metrics import Metrics

GRACE_S = 1.0
"""How long one must have waited for its client before it gives way: in a crowd that comes at once requests lie unread
in the kernel, and who sent one would lose it for a newcomer's sake."""
WARN_EVERY_S = 1.0
"""Connections ended in between are counted only."""

log = get_log(__name__)


class Ending(Enum):
    """Why this server ended a connection that a client might have used; a label of the metric."""

    TOO_MANY = "too_many"
    """Every connection there may be was being answered."""
    GAVE_WAY = "gave_way"
    """It waited longest, and a new one came."""
    NO_REQUEST = "no_request"
    """Nothing was asked on it; browsers open some in case."""
    SLOW_HEAD = "slow_head"
    BAD_HEAD = "bad_head"
    NO_HANDSHAKE = "no_handshake"
    """Its TLS handshake took too long."""
    BAD_HANDSHAKE = "bad_handshake"
    """What it said is no TLS, or none that this server speaks; or it does not believe this server's certificate."""


class Member(Protocol):
    """A connection, in whatever state, that can be ended."""

    def refuse(self, status: int, ending: Ending, message: str) -> None:
        """Ends it with an answer, where one can be heard."""

    def end(self, ending: Ending) -> None:
        """Ends it, counted and logged."""


class Connections:
    """Those of one server. A new one is let in while some other only waits, and has for `GRACE_S`: the one that has
    waited longest goes.
    """

    def __init__(self, metrics: Metrics, max_connections: int) -> None:
        self._max = max_connections
        self._all: set[Member] = set()
        self._waiting: OrderedDict[Member, float] = OrderedDict()  # since when, the longest first
        self._warned_at = float("-inf")
        self._num_unsaid = 0
        metrics.gauge("spolia_http_connections", "Connections of HTTP clients.").set_function(lambda: len(self._all))
        endings = metrics.counter("spolia_http_connections_ended_total", "Connections ended by the server.", "reason")
        self._endings = {ending: endings.labels(ending.value) for ending in Ending}

    def enter(self, connection: Member) -> bool:
        """A connection has begun, and waits; the end of another or, where none may give way, of this one: False."""
        if len(self._all) >= self._max:
            longest, since = next(iter(self._waiting.items()), (None, 0.0))
            if longest is not None and time.monotonic() - since >= GRACE_S:
                longest.end(Ending.GAVE_WAY)
            else:
                connection.refuse(503, Ending.TOO_MANY, f"this server has {self._max} connections, as many as it may")
                return False  # it waits for nothing: as one of those that do it would give way, and let one in too many
        self._all.add(connection)
        self.waits(connection)
        return True

    def waits(self, connection: Member) -> None:
        """It waits for its client, as from now."""
        self._waiting[connection] = time.monotonic()
        self._waiting.move_to_end(connection)

    def asks(self, connection: Member) -> None:
        """A request of it is under way."""
        self._waiting.pop(connection, None)

    def leave(self, connection: Member) -> None:
        """It is over, or will be without anybody's doing."""
        self._all.discard(connection)
        self._waiting.pop(connection, None)

    def ended(self, ending: Ending, peer: str) -> None:
        """Counts one, and warns of it; at most once in `WARN_EVERY_S`, since strangers decide how many there are."""
        self._endings[ending].inc()
        if ending is Ending.NO_REQUEST:
            log.debug("http connection ended", reason=ending.value, peer=peer)
        elif time.monotonic() - self._warned_at < WARN_EVERY_S:
            self._num_unsaid += 1
        else:
            log.warning("http connection ended", reason=ending.value, peer=peer, num_unsaid=self._num_unsaid)
            self._warned_at, self._num_unsaid = time.monotonic(), 0
