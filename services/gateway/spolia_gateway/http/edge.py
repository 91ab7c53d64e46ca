"""The outermost layer, as plain ASGI: request ids, the body's limits, counts and times, and where a trace begins."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from spolia_core.errors import InvalidRequest
from spolia_gateway.http.errors import error_response
from spolia_gateway.http.request_body import RequestBody
from spolia_gateway.limits import request_id_of
from spolia_gateway.turnstile import Turnstile
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
        turnstile: Turnstile,
        *,
        max_body_bytes: int,
        body_timeout_s: float,
        leaving: Callable[[], bool],
        refusal: Callable[[Headers], Response | None],
    ) -> None:
        """`leaving` says that the node drains: then each answer ends its connection, and the next goes elsewhere.
        `refusal` is the answer to who is not let in for what its headers say, before anything is done for it.
        """
        self._app = app
        self._leaving = leaving
        self._metrics = metrics
        self._tracing = tracing
        self._turnstile = turnstile
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        started, sent = time.monotonic(), _Sent(send, self._leaving)
        try:
            body = sent.body = RequestBody(receive, scope["headers"], self._max_body_bytes, self._body_timeout_s)
            sent.request_id = scope.setdefault("state", {})["request_id"] = request_id_of(_header(scope, REQUEST_ID))
            structlog.contextvars.bind_contextvars(request_id=sent.request_id)
            refusal = self._refusal(Headers(scope=scope))
            if refusal is not None:
                await refusal(scope, receive, sent)
                return
            if scope["path"] in TRACED:
                await self._turnstile.through()
            with self._span(scope):
                await self._app(scope, body, sent)
        except InvalidRequest as error:  # an id that cannot travel, a body of two lengths
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


class _Sent:
    """The response on its way out: its id is added, its status remembered. The connection ends with it where the node
    is leaving, and where it goes before its request's body has come whole.
    """

    def __init__(self, send: Send, leaving: Callable[[], bool]) -> None:
        self._send = send
        self._leaving = leaving
        self.request_id = ""
        self.status = 0
        self.body: RequestBody | None = None
        """None while nothing is known of it, as where a request says two lengths."""

    async def __call__(self, message: Message) -> None:
        """Passes a message on."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers: list[tuple[bytes, bytes]] = list(message.get("headers", ()))
            headers.append((REQUEST_ID, self.request_id.encode()))
            is_last = self._leaving() or self.body is None or self.body.is_pending
            if is_last and not any(key == b"connection" for key, _ in headers):
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        elif self.body is not None and self.body.is_pending and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self.body.drop_rest()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)


def _header(scope: Scope, name: bytes) -> str:
    """Empty where there is none."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    return next((value.decode("latin-1") for key, value in headers if key == name), "")
