"""A decode node that takes requests on the stream of their answers, and follows its script there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from gateway_fakes import WAIT_S, FakeDecode
from gateway_worlds import World

from spolia.errors import detail_of, status_of
from spolia.v1 import decode_pb2
from spolia_core.errors import SpoliaError


@dataclass
class ManyDecode(FakeDecode):
    """`requests` has all that it was asked, `streamed` those of them that came on the stream, as they came."""

    streamed: list[decode_pb2.StreamedRequest] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    posted: list[asyncio.Queue[decode_pb2.GenerateManyResponse | None]] = field(default_factory=list)
    """What each stream has still to say; None breaks it."""

    async def GenerateMany(self, requests: Any, context: Any) -> AsyncIterator[decode_pb2.GenerateManyResponse]:
        self.names.append((await anext(requests)).answer_stream)
        posted: asyncio.Queue[decode_pb2.GenerateManyResponse | None] = asyncio.Queue()
        self.posted.append(posted)
        reading = asyncio.ensure_future(self._read(requests, posted))
        try:
            yield decode_pb2.GenerateManyResponse()
            while (message := await posted.get()) is not None:
                yield message
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    def break_streams(self) -> None:
        """Ends all of them."""
        for posted in self.posted:
            posted.put_nowait(None)

    async def _read(self, requests: Any, posted: asyncio.Queue[Any]) -> None:
        running: dict[int, asyncio.Task[None]] = {}
        try:
            while True:
                message = await anext(requests)
                for streamed in message.requests:
                    self.streamed.append(streamed)
                    tag = streamed.request.answer_tag
                    running[tag] = asyncio.ensure_future(self._serve(streamed.request, posted))
                for tag in message.cancelled_tags:
                    self.cancelled.append(tag)
                    running[tag].cancel()
        finally:
            for task in running.values():
                task.cancel()
            await asyncio.gather(*running.values(), return_exceptions=True)

    async def _serve(self, request: Any, posted: asyncio.Queue[Any]) -> None:
        self.requests.append(request)
        self.num_running += 1
        self.started.set()
        said, tag = decode_pb2.GenerateManyResponse, request.answer_tag
        try:
            async for step in self.script(self, request, None):
                posted.put_nowait(said(steps=[decode_pb2.TaggedStep(answer_tag=tag, step=step)]))
                await asyncio.sleep(0)
        except SpoliaError as error:
            failure = decode_pb2.TaggedFailure(
                answer_tag=tag, code=status_of(error).value[0], message=error.message, detail=detail_of(error)
            )
            posted.put_nowait(said(failures=[failure]))
        finally:
            self.num_running -= 1
            self.ended.set()


async def known(w: World, *nodes: FakeDecode) -> None:
    """Returns once the gateway has a stream to each node."""
    streams = w.node.gateway._generator._answers
    async with asyncio.timeout(WAIT_S):
        for node in nodes:
            is_known = False
            while not is_known:
                # A stream that does not come about at once is forgotten, and begun again by whoever asks next.
                with streams.inbox(node.address):
                    await asyncio.sleep(0.005)
                there = streams._streams.get(node.address)
                is_known = there is not None and there.is_known
