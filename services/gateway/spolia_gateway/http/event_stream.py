"""Server-sent events, one JSON object each."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, closing
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from spolia_core.errors import Cancelled, SpoliaError
from spolia_gateway.backlog import ReaderTooSlow
from spolia_gateway.http.calls import Calls
from spolia_gateway.http.errors import error_body
from spolia_node.interceptor import STALLED_READER_S
from spolia_node.stall_watch import StallWatch

DONE = b"data: [DONE]\n\n"


def event(value: Mapping[str, Any]) -> bytes:
    """One event."""
    return _event(to_json(value))


class ChunkEvents:
    """Events of chunks that differ in their choice alone: what is around it is written once."""

    def __init__(self, around: Mapping[str, Any]) -> None:
        """`around` is a chunk without its `choices`, which follow it."""
        self._before = to_json(around)[:-1] + b',"choices":['

    def of(self, choice: Mapping[str, Any]) -> bytes:
        """The event of a chunk with one choice."""
        return _event(self._before + to_json(choice) + b"]}")


def _event(text: bytes) -> bytes:
    return b"data: " + text + b"\n\n"


class EventStream(Response):
    """Sends what a generator yields, and closes it. Headers go out with the first events: what fails before is an HTTP
    error with a status of its own, what fails later the stream's last event, in the place of `[DONE]`.
    """

    media_type = "text/event-stream"

    def __init__(self, calls: Calls, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        # Neither the length of a stream nor how it ends is known.
        self.raw_headers = [header for header in self.raw_headers if header[0] != b"content-length"]
        self._calls = calls
        self._events = events
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves the stream; returns when it has ended and nothing is held for it."""
        with closing(StallWatch(STALLED_READER_S)) as watch:
            last = b""
            try:
                await self._calls.run(receive, self._send_all(watch, send))
            except SpoliaError as error:
                if isinstance(error, Cancelled) and not isinstance(error, ReaderTooSlow):
                    return
                if not self._begun:
                    raise
                last = event(error_body(error))
            await _written(watch, send, {"type": "http.response.body", "body": last, "more_body": False})

    async def _send_all(self, watch: StallWatch, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for data in events:
                if not self._begun:
                    start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                    await _written(watch, send, start)
                    self._begun = True
                await _written(watch, send, {"type": "http.response.body", "body": data, "more_body": True})


async def _written(watch: StallWatch, send: Send, message: dict[str, Any]) -> None:
    """Raises `Cancelled` for a client that takes nothing any more."""
    try:
        with watch:
            await send(message)
    except TimeoutError:
        raise Cancelled(f"the client read nothing for {STALLED_READER_S:g} s") from None
