"""A connection of an HTTP client: how long it may take to ask for something, and how it ends."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from starlette.responses import JSONResponse
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from spolia_gateway.http.connections import Connections, Ending
from spolia_gateway.http.errors import plain_error

HEAD_TIMEOUT_S = 10.0
"""How long a client may take from its first byte, or on a new connection from its beginning, to the end of a request's
head. A client that connects asks at once; one that does not holds a place."""
MAX_HEAD_BYTES = 64 << 10
RETRY_S = 1


class AnswerWriter(h11.Connection):
    """Gives the head of an answer together with what follows it: they go in one packet, which wakes the client once."""

    _head = b""

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]  # its overloads say which is None
        """What there is to write now."""
        data = super().send(event)
        if isinstance(event, h11.Response):
            self._head = data or b""
            return b""
        if data is None:
            return None
        head, self._head = self._head, b""
        return head + data


class Connection(H11Protocol):
    """uvicorn's, with a time limit for heads of requests, and a say in how it ends.

    Bodies are bounded by `RequestBody`, waiting between requests by uvicorn's keep-alive, and reading answers by the
    kernel (`server.READER_TIMEOUT_S`).
    """

    def __init__(
        self, among: Connections, config: Config, server_state: ServerState, app_state: dict[str, Any]
    ) -> None:
        super().__init__(config, server_state, app_state)
        self.conn = AnswerWriter(h11.SERVER, MAX_HEAD_BYTES)
        self._among = among
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """A client is there."""
        super().connection_made(transport)
        self._await_head()
        self._among.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, or has been sent away."""
        self._stop_waiting()
        self._among.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        if self.transport.is_closing():
            return  # TLS still hands over what had come before it was told to close
        super().data_received(data)
        if self._is_answering:
            self._stop_waiting()
            self._among.asks(self)
        elif self._head_timer is None and not self.transport.is_closing():
            self._await_head()

    def on_response_complete(self) -> None:
        """An answer has gone out; the next request may have come already."""
        super().on_response_complete()
        if not self._is_answering and not self.transport.is_closing():
            self._among.waits(self)

    def send_400_response(self, msg: str) -> None:
        """For what is no HTTP. uvicorn calls it, also where an answer has begun."""
        if len(self.conn.trailing_data[0]) > MAX_HEAD_BYTES:
            large = f"the request's head is larger than {MAX_HEAD_BYTES} bytes, the most that is taken"
            self.refuse(431, Ending.BAD_HEAD, large)
        else:
            self.refuse(400, Ending.BAD_HEAD, "this is no request of HTTP/1.1")

    def refuse(self, status: int, ending: Ending, message: str) -> None:
        """Ends it with an answer, where none has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = {"connection": "close"} | ({"retry-after": str(RETRY_S)} if status == 503 else {})
            self._write(plain_error(status, message, ending.value, headers))
        self.end(ending)

    def end(self, ending: Ending) -> None:
        """Ends it, counted and logged."""
        self._among.ended(ending, "" if self.client is None else self.client[0])
        self._stop_waiting()
        self._among.leave(self)
        if self.cycle is not None:  # a handler may be at work whose request broke off: it is told that its client went
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if ending is Ending.GAVE_WAY:
            self.transport.abort()  # its place is needed now
        else:
            self.transport.close()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.conn.trailing_data[0]:
            self.refuse(408, Ending.SLOW_HEAD, f"the request's head did not come within {HEAD_TIMEOUT_S:g} s")
        else:
            self.end(Ending.NO_REQUEST)

    def _write(self, answer: JSONResponse) -> None:
        events = (
            h11.Response(status_code=answer.status_code, headers=answer.raw_headers),
            h11.Data(data=bytes(answer.body)),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
