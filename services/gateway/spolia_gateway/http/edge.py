"""The outermost layer, as plain ASGI: request ids, the body's limits, counts and times."""

from __future__ import annotations

import asyncio
import time

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from spolia_core.errors import InvalidRequest
from spolia_gateway.http.errors import error_response, plain_error
from spolia_gateway.limits import request_id_of
from spolia_node.metrics import Metrics

REQUEST_ID = b"x-request-id"
UNMATCHED = "unmatched"


class HttpMetrics:
    """Requests over HTTP, by route: paths nobody serves count as one."""

    def __init__(self, metrics: Metrics) -> None:
        self._requests = metrics.counter("spolia_http_requests_total", "HTTP requests that ended.", "route", "status")
        self._seconds = metrics.histogram("spolia_http_seconds", "Length of HTTP requests, streams included.", "route")

    def ended(self, route: str, status: int, seconds: float) -> None:
        """Counts one. Status 499: the client went before an answer began."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)


class Edge:
    """Gives each request its id, which the answer names, and bounds what it may send and for how long."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics, *, max_body_bytes: int, body_timeout_s: float) -> None:
        self._app = app
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        started, sent = time.monotonic(), _Sent(send)
        try:
            sent.request_id = scope.setdefault("state", {})["request_id"] = request_id_of(_header(scope, REQUEST_ID))
            structlog.contextvars.bind_contextvars(request_id=sent.request_id)
            body = _Body(receive, self._max_body_bytes, self._body_timeout_s)
            await self._passed_on(scope, body, sent)
        except InvalidRequest as error:  # an id that cannot travel
            sent.request_id = request_id_of("")
            await error_response(error)(scope, receive, sent)
        finally:
            route = getattr(scope.get("route"), "path", UNMATCHED)
            self._metrics.ended(route, sent.status or 499, time.monotonic() - started)

    async def _passed_on(self, scope: Scope, body: _Body, sent: _Sent) -> None:
        try:
            body.check(int(_header(scope, b"content-length") or 0))
            await self._app(scope, body, sent)
        except _TooLarge:
            message = f"the body is larger than {self._max_body_bytes} bytes, the most that is taken"
            await self._refused(plain_error(413, message, "body_too_large"), scope, body, sent)
        except _TooSlow:
            message = f"the body did not come within {self._body_timeout_s:g} s"
            await self._refused(plain_error(408, message, "body_too_slow"), scope, body, sent)

    async def _refused(self, answer: ASGIApp, scope: Scope, body: _Body, sent: _Sent) -> None:
        if not sent.status:
            sent.closes = True  # the rest of the body is not waited for
            await answer(scope, body, sent)


class _TooLarge(Exception):
    """More bytes than are taken."""


class _TooSlow(Exception):
    """No whole body in time."""


class _Body:
    """The request's body, counted and timed as it comes. After its end it only says when the client has gone."""

    def __init__(self, receive: Receive, max_bytes: int, timeout_s: float) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._until = asyncio.get_running_loop().time() + timeout_s
        self._num_bytes = 0
        self._whole = False

    def check(self, num_bytes: int) -> None:
        """Raises `_TooLarge`."""
        if num_bytes > self._max_bytes:
            raise _TooLarge

    async def __call__(self) -> Message:
        """The next message."""
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise _TooSlow from None
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            self.check(self._num_bytes)
            self._whole = not message.get("more_body", False)
        return message


class _Sent:
    """The response on its way out: its id is added, its status remembered."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.request_id = ""
        self.status = 0
        self.closes = False

    async def __call__(self, message: Message) -> None:
        """Passes a message on."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers: list[tuple[bytes, bytes]] = list(message.get("headers", ()))
            headers.append((REQUEST_ID, self.request_id.encode()))
            if self.closes:
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        await self._send(message)


def _header(scope: Scope, name: bytes) -> str:
    """Empty where there is none."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    return next((value.decode("latin-1") for key, value in headers if key == name), "")
