"""The HTTP endpoint that Prometheus reads a node's metrics from, on threads of its own."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from socketserver import TCPServer, ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

CLIENT_TIMEOUT_S = 10.0
"""How long a client may take over a request, or over reading its answer."""

WAKE_TIMEOUT_S = 1.0


class MetricsEndpoint:
    """Serves a registry from its making to `stop`. Raises `OSError` when the address cannot be bound."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        kind = _Server6 if ":" in host else _Server
        self._server = kind((host, port), _Handler)
        self._server.set_app(make_wsgi_app(registry))
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._server.server_port

    def stop(self) -> None:
        """Ends it. Idempotent. Answers under way are cut off with the process."""
        self._stopping = True
        self._wake()
        self._thread.join(WAKE_TIMEOUT_S)
        self._server.server_close()

    def _serve(self) -> None:
        # Not `serve_forever`, which looks twice a second whether it is to end: as long would every node take to.
        while not self._stopping:
            self._server.handle_request()

    def _wake(self) -> None:
        """Has the thread look at `_stopping`: what it waits for is a connection."""
        host, port = self._server.server_address[:2]
        reached = "127.0.0.1" if host == "0.0.0.0" else "::1" if host == "::" else str(host)
        with suppress(OSError):  # then its thread, which keeps no process alive, is left to itself
            socket.create_connection((reached, port), WAKE_TIMEOUT_S).close()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    allow_reuse_port = False  # two nodes on one port would share its requests; the second must fail instead
    request_queue_size = 64

    def server_bind(self) -> None:
        """As the base class, but asks no name server what this machine is called."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_TIMEOUT_S

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: scrapes are no events."""
