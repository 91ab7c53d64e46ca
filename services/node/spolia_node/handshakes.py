"""How many TLS handshakes began, and how many of them came to nothing.

gRPC tells a server when a handshake begins and not how it ends; it writes the reason of a failed one to standard error
itself. Nodes connect in order to call, so a handshake behind which no call comes was refused, or was somebody's probe.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque

from spolia_node.logs import get_log
from spolia_node.metrics import Metrics

GRACE_S = 10.0
"""How long a call may take to follow its handshake."""

MAX_PEERS = 8192
"""Connections remembered, so that their next call is not taken for the first. More than a cluster has nodes."""

log = get_log(__name__)


class Handshakes:
    """The handshakes of one server. `began` may be called from any thread, the rest on the loop."""

    def __init__(self, metrics: Metrics) -> None:
        self._loop = asyncio.get_running_loop()
        self._grace_s = GRACE_S
        self._pending: deque[float] = deque()
        self._peers: OrderedDict[str, None] = OrderedDict()
        handshakes = metrics.counter(
            "spolia_tls_handshakes_total", "TLS handshakes begun, by whether a call followed within 10 s.", "outcome"
        )
        self._used, self._unused = handshakes.labels("used"), handshakes.labels("unused")

    def began(self) -> None:
        """Somebody connected."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._note)

    def called(self, peer: str) -> None:
        """A call came over the connection of `peer`, "ipv4:host:port"."""
        if peer in self._peers:
            self._peers.move_to_end(peer)
            return
        self._peers[peer] = None
        if len(self._peers) > MAX_PEERS:
            self._peers.popitem(last=False)
        if self._pending:
            self._pending.popleft()
        self._used.inc()

    def _note(self) -> None:
        self._pending.append(time.monotonic())
        self._loop.call_later(self._grace_s, self._settle)

    def _settle(self) -> None:
        too_old = time.monotonic() - self._grace_s + 0.001
        num_unused = 0
        while self._pending and self._pending[0] <= too_old:
            self._pending.popleft()
            num_unused += 1
        if num_unused:
            self._unused.inc(num_unused)
            log.warning("nobody called after a TLS handshake: refused, or a probe", num_handshakes=num_unused)
