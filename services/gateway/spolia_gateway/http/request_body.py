"""The body of a request: how large it may be, how long it may take, and what becomes of one that nobody reads."""

from __future__ import annotations

import asyncio

from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from spolia_core.errors import InvalidRequest

LINGER_S = 2.0
"""How long the rest of a body is still taken, and dropped, for who was answered before its end. Closing at once would
reset the connection, and the answer would be lost on the way to a client that sends all before it reads."""


class BodyRefused(HTTPException):
    """A body that is not waited for any longer. Of a class that FastAPI lets pass while it reads one."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(status, message)
        self.code = code


def check_encoding(told: str) -> None:
    """Raises `BodyRefused` unless `content-encoding`, empty for none, says that the body comes as it is. What is packed
    small may be of any size.
    """
    if told.strip().lower() not in ("", "identity"):
        message = f"content-encoding {told[:100]} is not read; send the body as it is"
        raise BodyRefused(415, message, "unsupported_content_encoding")


class RequestBody:
    """The body, counted and timed as it comes. After its end it only says when the client has gone."""

    def __init__(self, receive: Receive, headers: list[tuple[bytes, bytes]], max_bytes: int, timeout_s: float) -> None:
        """Raises `InvalidRequest` for two lengths at once: a proxy before this server may have believed the other."""
        told = dict(headers)
        length, encoding = told.get(b"content-length"), told.get(b"transfer-encoding")
        if length is not None and encoding is not None:
            field = "transfer-encoding"
            raise InvalidRequest("content-length and transfer-encoding say different lengths; send one", field=field)
        self._receive = receive
        self._num_bytes = 0
        self._told_bytes = int(length or 0)
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._until = asyncio.get_running_loop().time() + timeout_s
        self._whole = encoding is None and not self._told_bytes
        self._comes_when_asked = told.get(b"expect", b"").lower() == b"100-continue"

    @property
    def is_pending(self) -> bool:
        """Whether some of it was not received. Then the connection cannot take another request."""
        return not self._whole

    async def __call__(self) -> Message:
        """The next message. Raises `BodyRefused`."""
        if self._whole:
            return await self._receive()
        self._check(self._told_bytes)
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._next()
        except TimeoutError:
            late = f"the body did not come within {self._timeout_s:g} s"
            raise BodyRefused(408, late, "body_too_slow") from None
        self._check(self._num_bytes)
        return message

    async def drop_rest(self) -> None:
        """Takes what still comes, within the body's limits and `LINGER_S`, and forgets it."""
        if self._comes_when_asked and not self._num_bytes:
            return  # it was not asked for
        until = min(self._until, asyncio.get_running_loop().time() + LINGER_S)
        try:
            async with asyncio.timeout_at(until):
                while not self._whole and self._num_bytes <= self._max_bytes:
                    if (await self._next())["type"] == "http.disconnect":
                        return
        except TimeoutError:
            return

    async def _next(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
        return message

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            large = f"the body is larger than {self._max_bytes} bytes, the most that is taken"
            raise BodyRefused(413, large, "body_too_large")
