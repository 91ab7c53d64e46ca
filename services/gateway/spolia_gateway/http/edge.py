"""The outermost layer, as plain ASGI: request ids, the body's limits, counts and times, and where a trace begins."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from spolia_core.errors import InvalidRequest
from spolia_gateway.http.errors import error_response
from spolia_gateway.limits import request_id_of
from spolia_node.metrics import Metrics
from spolia_node.tracing import NO_SPAN, Span, Tracing

REQUEST_ID = b"x-request-id"
UNMATCHED = "unmatched"
TRACED = ("/v1/chat/completions", "/v1/completions")
"""Probes and scrapes would drown what is done for users."""


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

    def __init__(
        self,
        app: ASGIApp,
        metrics: HttpMetrics,
        tracing: Tracing,
        *,
        max_body_bytes: int,
        body_timeout_s: float,
        leaving: Callable[[], bool],
    ) -> None:
        """`leaving` says that the node drains: then each answer ends its connection, and the next goes elsewhere."""
        self._app = app
        self._leaving = leaving
        self._metrics = metrics
        self._tracing = tracing
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        started, sent = time.monotonic(), _Sent(send, self._leaving)
        try:
            sent.request_id = scope.setdefault("state", {})["request_id"] = request_id_of(_header(scope, REQUEST_ID))
            structlog.contextvars.bind_contextvars(request_id=sent.request_id)
            length = int(_header(scope, b"content-length") or 0)
            body = _Body(receive, length, self._max_body_bytes, self._body_timeout_s)
            with self._span(scope):
                await self._app(scope, body, sent)
        except InvalidRequest as error:  # an id that cannot travel
            sent.request_id = request_id_of("")
            await error_response(error)(scope, receive, sent)
        finally:
            route = getattr(scope.get("route"), "path", UNMATCHED)
            self._metrics.ended(route, sent.status or 499, time.monotonic() - started)

    def _span(self, scope: Scope) -> Span:
        if scope["path"] not in TRACED:
            return NO_SPAN
        headers = ((key.decode("latin-1"), value.decode("latin-1")) for key, value in scope["headers"])
        return self._tracing.enter_http(scope["method"], scope["path"], headers)


class BodyRefused(HTTPException):
    """A body that is not waited for any longer. Of a class that FastAPI lets pass while it reads one."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(status, message, headers={"connection": "close"})  # the rest of the body may still come
        self.code = code


class _Body:
    """The request's body, counted and timed as it comes. After its end it only says when the client has gone."""

    def __init__(self, receive: Receive, told_bytes: int, max_bytes: int, timeout_s: float) -> None:
        """`told_bytes`: what the request says it has, 0 where it does not say."""
        self._receive = receive
        self._num_bytes = 0
        self._told_bytes = told_bytes
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._until = asyncio.get_running_loop().time() + timeout_s
        self._whole = False

    async def __call__(self) -> Message:
        """The next message. Raises `BodyRefused`."""
        if self._whole:
            return await self._receive()
        self._check(self._told_bytes)
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            late = f"the body did not come within {self._timeout_s:g} s"
            raise BodyRefused(408, late, "body_too_slow") from None
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            self._check(self._num_bytes)
            self._whole = not message.get("more_body", False)
        return message

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            large = f"the body is larger than {self._max_bytes} bytes, the most that is taken"
            raise BodyRefused(413, large, "body_too_large")


class _Sent:
    """The response on its way out: its id is added, its status remembered, and whether the connection ends with it."""

    def __init__(self, send: Send, leaving: Callable[[], bool]) -> None:
        self._send = send
        self._leaving = leaving
        self.request_id = ""
        self.status = 0

    async def __call__(self, message: Message) -> None:
        """Passes a message on."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers: list[tuple[bytes, bytes]] = list(message.get("headers", ()))
            headers.append((REQUEST_ID, self.request_id.encode()))
            if self._leaving() and not any(key == b"connection" for key, _ in headers):
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        await self._send(message)


def _header(scope: Scope, name: bytes) -> str:
    """Empty where there is none."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    return next((value.decode("latin-1") for key, value in headers if key == name), "")
