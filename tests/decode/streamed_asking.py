"""A caller that asks a decode node on one stream, as a gateway does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from tiny_answers import Answer, generate_request
from tiny_cluster import WAIT_S, Parts, eventually, tokens

from spolia.v1 import decode_pb2
from spolia.v1.decode_pb2_grpc import DecodeServiceStub
from spolia_core.sampling import SamplingParams
from spolia_decode.node import DecodeNode

NAME = b"a gateway's stream"
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=300, ignore_eos=True)


@dataclass
class Asker:
    """What came of a stream: answers and failures by tag."""

    node: DecodeNode
    call: Any
    answers: dict[int, Answer] = field(default_factory=dict)
    failures: dict[int, decode_pb2.TaggedFailure] = field(default_factory=dict)
    reading: asyncio.Task[None] | None = None

    async def read(self) -> None:
        """To its end. Raises what ended it."""
        async for message in self.call:
            for tagged in message.steps:
                self.answers.setdefault(tagged.answer_tag, Answer()).take(tagged.step)
            for failure in message.failures:
                assert failure.answer_tag not in self.failures
                self.failures[failure.answer_tag] = failure

    async def say(self, **fields: Any) -> None:
        """One message."""
        await self.call.write(decode_pb2.GenerateManyRequest(**fields))

    async def ask(self, tag: int, params: SamplingParams = GREEDY, parts: Parts | None = None, **fields: Any) -> None:
        """One request, by the prompt that goes with its tag."""
        await self.say(requests=[self.streamed(tag, params, parts, **fields)])

    def streamed(
        self, tag: int, params: SamplingParams = GREEDY, parts: Parts | None = None, **fields: Any
    ) -> decode_pb2.StreamedRequest:
        """A good request; `fields` are those beside it."""
        request = generate_request(self.node, parts or prompt(tag), params, answer_tag=tag)
        return decode_pb2.StreamedRequest(request=request, **fields)

    async def finished(self, *tags: int) -> None:
        """Returns when all of them have come to their finish."""
        await eventually(lambda: all(tag in self.answers and self.answers[tag].finish is not None for tag in tags))

    async def ended(self) -> None:
        """Returns when the stream has ended well; raises what ended it else."""
        assert self.reading is not None
        await asyncio.wait_for(asyncio.shield(self.reading), WAIT_S)


def prompt(tag: int) -> Parts:
    """Another for each tag."""
    return [tokens(20 + tag, tag)]


@asynccontextmanager
async def asking(node: DecodeNode, name: bytes = NAME) -> AsyncIterator[Asker]:
    """A stream that the node knows; dropped at the end."""
    async with grpc.aio.insecure_channel(node.server.address) as channel:
        call = DecodeServiceStub(channel).GenerateMany()
        await call.write(decode_pb2.GenerateManyRequest(answer_stream=name))
        first = await asyncio.wait_for(anext(aiter(call)), WAIT_S)
        assert not first.steps, "the first says that requests may follow"
        asker = Asker(node, call)
        asker.reading = asyncio.ensure_future(asker.read())
        try:
            yield asker
        finally:
            call.cancel()
            await asyncio.gather(asker.reading, return_exceptions=True)
