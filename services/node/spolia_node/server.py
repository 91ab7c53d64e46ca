"""A node's gRPC server and its life: start, serve, drain, stop, in that order."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Protocol

import grpc
from grpc_reflection.v1alpha import reflection

from spolia.version import __version__
from spolia_core.errors import InvalidRequest, SpoliaError, Unavailable
from spolia_node.certificates import Certificates, NodeCertificates
from spolia_node.channels import connection_options
from spolia_node.config import NodeConfig
from spolia_node.deadline import Deadline
from spolia_node.edges import FRONT_DOORS
from spolia_node.guard import Guard
from spolia_node.handshakes import Handshakes
from spolia_node.health import HEALTH_SERVICE, Health
from spolia_node.interceptor import Admit, ErrorInterceptor
from spolia_node.logs import get_log
from spolia_node.metrics import Metrics
from spolia_node.tls import server_credentials
from spolia_node.tracing import Metadata, Tracing

_ALWAYS_ON = (HEALTH_SERVICE, reflection.SERVICE_NAME)
"""Peers hold streams of these open for as long as they live: a drain ends them without waiting."""

_FAREWELL_S = 1.0

HANDSHAKE_TIMEOUT_MS = 10_000
"""How long a caller may take to connect, TLS and HTTP/2 together."""

log = get_log(__name__)


class Membership(Protocol):
    """The node's entry in the directory."""

    def touch(self) -> Awaitable[None] | None:
        """Sends the record as it is now."""

    async def stop(self) -> None:
        """Leaves the directory."""


class NodeServer:
    """Owns the server, its health, its metrics and its spans. Needs a running event loop from `start` on.

    With `tls_dir` set callers are let in by their certificates (`spolia_node.edges`), except where the service is for
    users. Raises `InvalidRequest` for certificates that cannot be used.

    A service adds what it serves with `add`, sets `admit` where a call shows who makes it, `front_certificates` where
    users are shown others than nodes, and `registration` when it joins a directory; it appends to `on_drain` what must
    end before the server does, while calls go on, and to `on_stop` what ends beside it, by the deadline it is given.
    Hooks of a kind run concurrently.
    """

    def __init__(self, config: NodeConfig, role: str) -> None:
        self.config = config
        self.role = role
        self.node_id = config.node_id
        self.health = Health()
        self.metrics = Metrics()
        self.certificates = NodeCertificates(config.tls_dir, role) if config.tls_dir is not None else None
        self.front_certificates: Certificates | None = self.certificates
        self.admit: Admit | None = None
        self.metrics.gauge("spolia_node_info", "1: who this node is.", "role", "node_id", "version").labels(
            role, config.node_id, __version__
        ).set(1)
        self.tracing = Tracing(config, role)
        self.options: list[tuple[str, int]] = []
        """Of gRPC, beside those that every node has."""
        self.registration: Membership | None = None
        self.on_drain: list[Callable[[], Awaitable[None]]] = []
        self.on_stop: list[Callable[[Deadline], Awaitable[None]]] = []
        self.announced: dict[str, str] = {}
        """Where else this node is reached, by name; said when it is ready."""
        self._registrars: dict[str, Callable[[grpc.aio.Server], None]] = {}
        self._interceptor = ErrorInterceptor(self.metrics.observe_rpc, self.tracing.enter)
        self._server: grpc.aio.Server | None = None
        self._port = 0
        self._metrics_port = 0
        self._accepting = False
        self._leaving = False
        self._draining: asyncio.Task[bool] | None = None

    @property
    def address(self) -> str:
        """Where peers reach this node, "host:port". Call after `start`."""
        return join_address(self.config.advertise_host, self._port)

    @property
    def metrics_address(self) -> str:
        """Where Prometheus reads this node's metrics, "host:port"; empty where nowhere. Call after `start`."""
        host = self.config.advertise_host if not self.config.metrics_host else self.config.metrics_host
        return join_address(host, self._metrics_port) if self._metrics_port else ""

    @property
    def accepting(self) -> bool:
        """Whether new work may begin: from `start` until a drain has been told to whoever sends some."""
        return self._accepting

    @property
    def leaving(self) -> bool:
        """Whether a drain has begun: callers are to turn to other nodes, though this one may still be accepting."""
        return self._leaving

    @property
    def num_running(self) -> int:
        """Calls under way, health and reflection included."""
        return self._interceptor.num_running

    async def run_inside(self, method: str, metadata: Metadata, work: Awaitable[None]) -> SpoliaError | None:
        """`ErrorInterceptor.run_inside`: a call that came with others inside one."""
        return await self._interceptor.run_inside(method, metadata, work)

    def check_accepting(self) -> None:
        """Raises `Unavailable` unless new work may begin; for the head of a handler that begins some."""
        if not self._accepting:
            raise Unavailable(f"{self.node_id} is draining; ask another node")

    def add(self, register: Callable[[grpc.aio.Server], None], service_full_name: str) -> None:
        """Adds a service, before `start`; `register` is given the server, as generated `add_…_to_server` wants it."""
        if self._server is not None:
            raise AssertionError("services are added before the server starts")
        self._registrars[service_full_name] = register
        self.health.set(service_full_name, True)

    async def start(self) -> int:
        """Binds and serves; the port. Raises `InvalidRequest`, naming the setting, for a port that cannot be bound."""
        self._interceptor.admit = self.admit
        server = grpc.aio.server(interceptors=(self._interceptor,), options=self._options())
        for register in self._registrars.values():
            register(server)
        self.health.register(server)
        self.metrics.begin_rpcs((*self._registrars, HEALTH_SERVICE))
        reflection.enable_server_reflection((*self._registrars, *_ALWAYS_ON), server)
        self._port = self._bind(server)
        self._tell_expiry()
        self._serve_metrics()
        if self._metrics_port:
            self.announced["metrics"] = self.metrics_address
        await server.start()
        self._server = server
        self.health.start()
        self._accepting = True
        log.info("serving", address=self.address, metrics=self.metrics_address)
        return self._port

    async def run_until_signal(self) -> int:
        """Prints READY, waits for SIGTERM or SIGINT, drains; the exit code of the process.

        0 after a drain in which every hook ended well, 1 after another, 128 + the signal's number when a second signal
        cut the drain short. Main thread only.
        """
        loop = asyncio.get_running_loop()
        signals: asyncio.Queue[int] = asyncio.Queue()
        handled = (signal.SIGTERM, signal.SIGINT)
        for number in handled:
            loop.add_signal_handler(number, signals.put_nowait, number)
        try:
            self._announce()
            log.info("draining", signal=signal.Signals(await signals.get()).name)
            return await self._drain_unless(signals)
        finally:
            for number in handled:
                loop.remove_signal_handler(number)

    async def drain(self) -> bool:
        """Ends the node in order; whether every hook ended well and in time. Later calls join the first.

        Health says NOT_SERVING and the directory is told; for `drain_delay_s` new work is still taken, from those who
        have not heard yet; then none is, and the hooks run; calls under way have what is left of `drain_timeout_s` to
        finish, then their callers get `Unavailable`; the node leaves the directory.
        """
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain(), name="drain")
        return await asyncio.shield(self._draining)

    async def stop_at_once(self) -> None:
        """Ends the node without waiting for anyone; callers under way get `Unavailable`. Also cuts a drain short."""
        if self._draining is not None:
            self._draining.cancel()
            await asyncio.gather(self._draining, return_exceptions=True)
        self._say_it_leaves()
        self._accepting = False
        await self._stop_serving(Deadline.after(0.0))
        await self._stop_telling()
        await self._leave_directory()

    def _options(self) -> list[tuple[str, int]]:
        return [
            *connection_options(self.config.max_message_bytes),
            # Two processes on one port would share its calls; the second must fail instead.
            ("grpc.so_reuseport", 0),
            # Peers probe often; without this they are dropped as a nuisance.
            ("grpc.http2.min_ping_interval_without_data_ms", 500),
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
            *self.options,
        ]

    def _bind(self, server: grpc.aio.Server) -> int:
        config = self.config
        address, credentials = join_address(config.host, config.port), self._credentials()
        try:
            if credentials is not None:
                return server.add_secure_port(address, credentials)
            if not config.is_local:
                log.warning("serving WITHOUT TLS, as allow_plaintext says: whoever connects is trusted", host=address)
            return server.add_insecure_port(address)
        except RuntimeError as error:
            raise _cannot_bind("port", config.port, error) from error

    def _credentials(self) -> grpc.ServerCredentials | None:
        """What the port is served under; also sets the door before the handlers. None is plaintext."""
        if FRONT_DOORS.intersection(self._registrars):  # its callers show keys instead, to the service itself
            shown = self.front_certificates
            return None if shown is None else server_credentials(shown, with_client_certificate=False)
        if self.certificates is None:
            return None
        guard, handshakes = Guard(self.metrics, self._registrars), Handshakes(self.metrics)

        def check(method: str, context: Any) -> None:
            handshakes.called(context.peer())
            guard.check(method, context)

        self._interceptor.check = check
        return server_credentials(self.certificates, with_client_certificate=True, on_handshake=handshakes.began)

    def _tell_expiry(self) -> None:
        ends = self.metrics.gauge(
            "spolia_tls_certificate_expiry_timestamp_seconds", "When it ends, seconds since 1970.", "shown_to"
        )
        for shown_to, certificates in (("nodes", self.certificates), ("users", self.front_certificates)):
            if certificates is not None:
                ends.labels(shown_to).set_function(partial(_expiry_of, certificates))

    def _serve_metrics(self) -> None:
        if self.config.metrics_port < 0:
            return
        host = self.config.metrics_host or self.config.host
        try:
            self._metrics_port = self.metrics.serve(host, self.config.metrics_port)
        except OSError as error:
            raise _cannot_bind("metrics_port", self.config.metrics_port, error) from error

    def _announce(self) -> None:
        also = "".join(f" {plane}={address}" for plane, address in self.announced.items())
        sys.stdout.write(f"READY {self.role} {self.address}{also}\n")
        sys.stdout.flush()

    async def _drain_unless(self, signals: asyncio.Queue[int]) -> int:
        drain = asyncio.ensure_future(self.drain())
        second = asyncio.ensure_future(signals.get())
        await asyncio.wait({drain, second}, return_when=asyncio.FIRST_COMPLETED)
        if drain.done():
            second.cancel()
            return 0 if drain.result() else 1
        log.warning("stopping at once", signal=signal.Signals(second.result()).name)
        await self.stop_at_once()
        await asyncio.gather(drain, return_exceptions=True)
        return 128 + second.result()

    async def _drain(self) -> bool:
        deadline = Deadline.after(self.config.drain_timeout_s)
        self._say_it_leaves()
        await self._tell_directory()
        await self._wait_until_known(deadline)
        self._accepting = False
        clean = await self._run_hooks(self.on_drain, deadline)
        # Where another server takes requests too, this one sends its callers elsewhere without waiting for that one.
        stopping = asyncio.ensure_future(self._stop_serving(deadline))
        try:
            clean &= await self._run_hooks([partial(hook, deadline) for hook in self.on_stop], deadline)
            await stopping
        finally:
            stopping.cancel()
            await asyncio.gather(stopping, return_exceptions=True)
        await self._stop_telling()
        await self._leave_directory()
        log.info("drained", clean=clean)
        return clean

    def _say_it_leaves(self) -> None:
        self._leaving = True
        self.health.drain()

    async def _wait_until_known(self, deadline: Deadline) -> None:
        """Nobody learns of the drain where there is no directory. At least half of the limit is left for calls."""
        if self.registration is not None:
            await asyncio.sleep(min(self.config.drain_delay_s, deadline.share(0.5).remaining()))

    async def _tell_directory(self) -> None:
        if self.registration is not None:
            told = self.registration.touch()
            if told is not None:
                await _bounded("tell the directory", told)

    async def _leave_directory(self) -> None:
        if self.registration is not None:
            await _bounded("leave the directory", self.registration.stop())

    async def _run_hooks(self, hooks: Sequence[Callable[[], Awaitable[None]]], deadline: Deadline) -> bool:
        if not hooks:
            return True
        tasks = [asyncio.ensure_future(_hook_ended_well(hook)) for hook in hooks]
        try:
            _, late = await asyncio.wait(tasks, timeout=deadline.remaining())
        finally:
            for task in tasks:
                task.cancel()
        if late:
            log.warning("drain hooks were late", num_hooks=len(late), limit_s=self.config.drain_timeout_s)
            await asyncio.wait(late, timeout=_FAREWELL_S)  # to clean up; no longer, even if they resist
        return not late and all(not task.cancelled() and task.result() for task in tasks)

    async def _stop_serving(self, deadline: Deadline) -> None:
        if self._server is None:
            return
        # From here on gRPC refuses new calls; those under way go on until they end or are ended below.
        stop = asyncio.ensure_future(self._server.stop(deadline.remaining() + _FAREWELL_S))
        await self.health.stop()
        gone = Unavailable(f"{self.node_id} is shutting down; ask another node")
        self._interceptor.end_running(gone, of_services=_ALWAYS_ON)
        await asyncio.wait({stop}, timeout=deadline.remaining())
        num_cut = self._interceptor.end_running(gone)
        if num_cut:
            log.warning("calls were cut short", num_calls=num_cut)
        await stop

    async def _stop_telling(self) -> None:
        """Last, so that what ended meanwhile is counted and traced."""
        await self.metrics.stop()
        await self.tracing.stop()


def _expiry_of(certificates: Certificates) -> float:
    return certificates.current().expires_at.timestamp()


async def _hook_ended_well(hook: Callable[[], Awaitable[None]]) -> bool:
    try:
        await hook()
    except Exception:
        log.exception("drain hook failed")
        return False
    return True


async def _bounded(what: str, work: Awaitable[None]) -> None:
    """Courtesies of the end: tried for a second, logged when they fail."""
    try:
        await asyncio.wait_for(work, _FAREWELL_S)
    except Exception as error:
        log.warning("could not " + what, error=repr(error))


def _cannot_bind(setting: str, port: int, error: Exception) -> InvalidRequest:
    return InvalidRequest(f"{setting} {port} cannot be bound: {error}", field=setting, actual=str(port))


def join_address(host: str, port: int) -> str:
    """The address, "host:port"."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
