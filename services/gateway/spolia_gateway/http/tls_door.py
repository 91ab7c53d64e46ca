"""What a TLS connection is before its handshake is done: counted among the others, and not for long.

    accepted ──▶ TlsDoor, in Connections ── handshake ──▶ Connection, in Connections

asyncio's own TLS servers tell a protocol of a client when its handshake is done. Until then nobody would count it, and
whoever connects and says nothing could hold a socket for each connection that the system lets it make.

Whoever is one too many can be told so behind a handshake only, which costs the event loop a third of a millisecond with
a P-256 key and over four with one of RSA-4096. So a few are let in to be told, and the rest is ended without a word, as
servers do that count before the handshake.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field

from spolia_gateway.http.connections import Connections, Ending

HANDSHAKE_TIMEOUT_S = 10.0
"""How long a client may take over a TLS handshake, or over the end of a TLS connection."""
MAX_TOLD = 32
"""Clients too many that may shake hands all the same, in every `TELLING_S`."""
TELLING_S = 1.0
"""How long one of these may take over it."""


@dataclass(frozen=True, slots=True)
class TlsDoors:
    """Those of one server. Makes one for each client that connects."""

    among: Connections
    context: ssl.SSLContext
    make_protocol: Callable[[], asyncio.Protocol]
    """Of what is behind."""
    shaking: set[TlsDoor] = field(default_factory=set)
    """Whose handshakes are under way."""
    told: list[TlsDoor] = field(default_factory=list)
    """Those too many that were let in for their handshake within the last `TELLING_S`."""

    def may_tell(self, door: TlsDoor) -> bool:
        """Whether this one too many may shake hands, as one of those few."""
        if len(self.told) >= MAX_TOLD:
            return False
        self.told.append(door)
        asyncio.get_running_loop().call_later(TELLING_S, self.told.remove, door)
        return True

    def __call__(self) -> TlsDoor:
        """The next one."""
        return TlsDoor(self)

    def close(self) -> None:
        """Ends the handshakes under way."""
        for door in tuple(self.shaking):
            door.drop()


class TlsDoor(asyncio.Protocol):
    """Shakes hands with one client, then leaves it to the protocol behind."""

    def __init__(self, doors: TlsDoors) -> None:
        self._doors = doors
        self._early: list[bytes] = []
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there. The handshake begins, unless there are too many."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._doors.among.enter(self):
            self._begin(HANDSHAKE_TIMEOUT_S)

    def data_received(self, data: bytes) -> None:
        """What came in the same packet as the end of the handshake: kept for the protocol behind, which has it within
        a turn of the loop.
        """
        self._early.append(data)

    def refuse(self, status: int, ending: Ending, message: str) -> None:
        """Ends it; or lets it shake hands, to be refused by the protocol behind, should there still be no place."""
        if self._doors.may_tell(self):
            self._begin(TELLING_S)
        else:
            self.end(ending)

    def end(self, ending: Ending) -> None:
        """Ends it, counted and logged."""
        self._doors.among.ended(ending, _peer_of(self._transport))
        self.drop()

    def drop(self) -> None:
        """Ends it without a word."""
        self._leave()
        self._transport.abort()

    def _leave(self) -> None:
        self._doors.among.leave(self)
        self._doors.shaking.discard(self)

    def _begin(self, timeout_s: float) -> None:
        self._doors.shaking.add(self)
        self._task = asyncio.get_running_loop().create_task(self._shake_hands(timeout_s), name="tls handshake")

    async def _shake_hands(self, timeout_s: float) -> None:
        if self._transport.is_closing():
            self.drop()
            return
        try:
            secured = await asyncio.get_running_loop().start_tls(
                self._transport,
                self,
                self._doors.context,
                server_side=True,
                ssl_handshake_timeout=timeout_s,
                ssl_shutdown_timeout=HANDSHAKE_TIMEOUT_S,
            )
        except ConnectionAbortedError:  # so asyncio says that the time is over
            self.end(Ending.NO_HANDSHAKE)
        except ssl.SSLError:
            self.end(Ending.BAD_HANDSHAKE)
        except OSError:  # the client went, or gave way
            self.drop()
        except BaseException:  # nothing we know of; its place is free all the same
            self.drop()
            raise
        else:
            self._leave()
            if secured is not None and not self._transport.is_closing():
                self._hand_over(secured)

    def _hand_over(self, secured: asyncio.Transport) -> None:
        protocol = self._doors.make_protocol()
        secured.set_protocol(protocol)
        protocol.connection_made(secured)
        if self._early:
            protocol.data_received(b"".join(self._early))


def _peer_of(transport: asyncio.BaseTransport) -> str:
    peer = transport.get_extra_info("peername")
    return str(peer[0]) if isinstance(peer, tuple) else ""
