"""The gRPC health protocol, telling the truth: a node whose work makes no progress is NOT_SERVING.

A service is SERVING while three things hold: nobody set it otherwise, the watched check says yes, and the node is not
draining. The overall service, "", is SERVING while the last two hold and every other service is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from spolia_core.errors import NotFound
from spolia_node.logs import get_log

HEALTH_SERVICE = "grpc.health.v1.Health"
OVERALL = ""
POLL_INTERVAL_S = 0.5
LAST_STATE_S = 1.0
START_S = 60.0
"""How long a node that has just begun may not be ready before that is worth a warning."""

log = get_log(__name__)


class Health:
    """The health of one node. `start` and `stop` bound the polling of the watched check."""

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {OVERALL: True}
        self._check: Callable[[], bool] | None = None
        self._check_ok = True
        self._was_ready = False
        self._late_s: float | None = None
        self._draining = False
        self._closed = False
        self._changed = asyncio.Event()
        self._poller: asyncio.Task[None] | None = None
        self._num_watchers = 0
        self._unwatched = asyncio.Event()
        self._unwatched.set()

    @property
    def servicer(self) -> HealthServicer:
        """The RPCs over this state."""
        return HealthServicer(self)

    @property
    def closed(self) -> bool:
        """Whether watchers are to end."""
        return self._closed

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the health service to a server that has not started."""
        self.servicer.register(server)

    def set(self, service_name: str, serving: bool) -> None:
        """Says whether a service can do its work. A name not known before becomes known."""
        self._serving[service_name] = serving
        self._notify()

    def watch(self, check: Callable[[], bool]) -> None:
        """Lets every service follow `check`: quick, no side effects. One that raises counts as False."""
        self._check = check

    def is_serving(self, service_name: str = OVERALL) -> bool | None:
        """Whether a service is serving; None for a name nobody set."""
        if service_name not in self._serving:
            return None
        names = self._serving if service_name == OVERALL else (service_name,)
        return self._check_ok and not self._draining and all(self._serving[name] for name in names)

    def refresh(self) -> None:
        """Asks the watched check now."""
        ok = self._asked()
        if ok != self._check_ok:
            self._check_ok = ok
            say = log.warning if self._was_ready else log.info  # who begins is not ready at first
            say("health changed", serving=ok)
            self._notify()
        self._was_ready = self._was_ready or ok
        if not self._was_ready and self._late_s is not None and time.monotonic() >= self._late_s:
            self._late_s = None
            log.warning("not ready since the start", seconds=START_S)

    def drain(self) -> None:
        """Makes everything NOT_SERVING, for good."""
        self._draining = True
        self._notify()

    def start(self) -> None:
        """Starts polling the watched check, every half second."""
        self._late_s = time.monotonic() + START_S
        self.refresh()
        self._poller = asyncio.get_running_loop().create_task(self._poll(), name="health")

    async def stop(self) -> None:
        """Ends polling, and the streams of watchers once they have the last state, or after a second. Idempotent."""
        self._closed = True
        self._notify()
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_STATE_S):
                await self._unwatched.wait()
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.gather(self._poller, return_exceptions=True)
            self._poller = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around the stream of one watcher, for `stop` to wait for."""
        self._num_watchers += 1
        self._unwatched.clear()
        try:
            yield
        finally:
            self._num_watchers -= 1
            if not self._num_watchers:
                self._unwatched.set()

    def changed(self) -> asyncio.Event:
        """An event set at the next change. Take it before reading the state, or a change between the two is lost."""
        return self._changed

    def _asked(self) -> bool:
        if self._check is None:
            return True
        try:
            return self._check()
        except Exception:
            if self._check_ok:  # once per fall, not twice a second
                log.exception("health check raised")
            return False

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            self.refresh()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class HealthServicer:
    """`grpc.health.v1.Health` over a `Health`."""

    def __init__(self, health: Health) -> None:
        self._health = health

    async def check(self, request: HealthCheckRequest, _context: Any) -> HealthCheckResponse:
        """The state of a service now, the watched check asked anew. Raises `NotFound` for an unknown name."""
        self._health.refresh()
        serving = self._health.is_serving(request.service)
        if serving is None:
            raise NotFound(f"no service {request.service!r} here", field="service", actual=request.service)
        return HealthCheckResponse(status=_status(serving))

    async def watch(self, request: HealthCheckRequest, _context: Any) -> AsyncIterator[HealthCheckResponse]:
        """The state of a service, then each change of it, until the node stops."""
        last = None
        with self._health.watched():
            while True:
                changed = self._health.changed()
                status = _status(self._health.is_serving(request.service))
                if status != last:
                    yield HealthCheckResponse(status=status)
                    last = status
                if self._health.closed:
                    return
                if not changed.is_set():
                    await changed.wait()

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service to a server that has not started."""
        codecs: dict[str, Any] = {
            "request_deserializer": HealthCheckRequest.FromString,
            "response_serializer": HealthCheckResponse.SerializeToString,
        }
        handlers = {
            "Check": grpc.unary_unary_rpc_method_handler(self.check, **codecs),
            "Watch": grpc.unary_stream_rpc_method_handler(self.watch, **codecs),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(HEALTH_SERVICE, handlers),))


def _status(serving: bool | None) -> int:
    if serving is None:
        return HealthCheckResponse.SERVICE_UNKNOWN
    return HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING
