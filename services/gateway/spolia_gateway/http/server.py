"""The HTTP server's life, beside the node's."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from spolia_core.errors import DeadlineExceeded, InvalidRequest, Unavailable
from spolia_gateway.http.calls import Calls
from spolia_gateway.http.connection import Connection
from spolia_gateway.http.connections import Connections
from spolia_gateway.http.tls_door import TlsDoors
from spolia_node.certificates import Certificates
from spolia_node.deadline import Deadline
from spolia_node.https import https_context
from spolia_node.logs import get_log

KEEP_ALIVE_S = 65
"""How long an idle connection stays open: longer than the proxies that people put before it keep theirs."""
BACKLOG = 2048
"""Connections that may wait to be taken."""
READER_TIMEOUT_S = 60.0
"""How long a client may take nothing of what was sent to it, on whatever connection; the kernel looks to it."""
UNWIND_S = 1.0
"""What calls that are ended get to say so."""
FAREWELL_S = 1
"""What connections get to close."""

log = get_log(__name__)


class HttpServer:
    """Serves an application in this event loop. `start` it, `drain` it with the node, `close` it at the end."""

    def __init__(
        self,
        app: ASGIApp,
        calls: Calls,
        connections: Connections,
        host: str,
        port: int,
        certificates: Certificates | None = None,
    ) -> None:
        """Under TLS where there are certificates."""
        self._calls = calls
        self._host = host
        self._port = port
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                app,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=FAREWELL_S,
                ssl_context_factory=None if certificates is None else partial(_https_context, certificates),
            ),
            connections,
        )
        self._serving: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """Where it listens. Call after `start`."""
        return self._port

    async def start(self) -> None:
        """Binds and serves. Raises `InvalidRequest` for a port that cannot be bound."""
        listener = _bound(self._host, self._port)
        self._port = listener.getsockname()[1]
        self._serving = asyncio.get_running_loop().create_task(self._uvicorn.serve([listener]), name="http")
        started = asyncio.ensure_future(self._uvicorn.is_serving.wait())
        await asyncio.wait({self._serving, started}, return_when=asyncio.FIRST_COMPLETED)
        if not started.done():
            started.cancel()
            await self._serving  # raises what kept it from serving
        log.info("serving http", port=self._port)

    async def drain(self, grace: Deadline) -> None:
        """Returns when no call is under way; those that are after `grace` are ended with `Unavailable`.

        New ones are for handlers to refuse: connections are still taken, so that health can be asked for.
        """
        try:
            await grace.wait(self._calls.wait_idle(), "draining http")
        except DeadlineExceeded:
            await self._end_calls()

    async def close(self) -> None:
        """Ends calls and connections. Idempotent; needs no drain, and no start, before it."""
        if self._serving is not None:
            serving, self._serving = self._serving, None
            await self._end_calls()
            self._uvicorn.should_exit = True
            await serving

    async def _end_calls(self) -> None:
        num_cut = self._calls.end(Unavailable("this node is shutting down; ask another node"))
        if num_cut:
            log.warning("http calls were cut short", num_calls=num_cut)
            await asyncio.wait({asyncio.ensure_future(self._calls.wait_idle())}, timeout=UNWIND_S)


class _Uvicorn(uvicorn.Server):
    """Leaves signals to the node, says when it serves, and takes connections of ours."""

    def __init__(self, config: uvicorn.Config, connections: Connections) -> None:
        super().__init__(config)
        self.is_serving = asyncio.Event()
        self._connections = connections
        self._doors: TlsDoors | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens at every socket."""
        await super().startup([])
        loop, tls = asyncio.get_running_loop(), self.config.ssl
        self._doors = None if tls is None else TlsDoors(self._connections, tls, self._connection)
        for listener in sockets or ():
            server = await loop.create_server(self._doors or self._connection, sock=listener, backlog=BACKLOG)
            self.servers.append(server)
        self.is_serving.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends everything that is under way."""
        if self._doors is not None:
            self._doors.close()
        await super().shutdown(sockets)

    def _connection(self) -> Connection:
        return Connection(self._connections, self.config, self.server_state, self.lifespan.state)


def _https_context(certificates: Certificates, _config: object, _default: object) -> ssl.SSLContext:
    """As uvicorn asks for one."""
    return https_context(certificates)


def _bound(host: str, port: int) -> socket.socket:
    # asyncio turns off Nagle's algorithm, which would hold each token back until the one before was acknowledged, 40 ms
    # at the worst, only for sockets that say their protocol; `socket.create_server` makes one that does not.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections have it from their listener
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(READER_TIMEOUT_S * 1000))
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
        return listener
    except OSError as error:
        listener.close()
        raise InvalidRequest(
            f"http_port {port} cannot be bound: {error}", field="http_port", actual=str(port)
        ) from error
