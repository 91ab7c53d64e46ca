"""Many answers on one stream: each whole and in order, in few messages, and nothing held when its reader goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from tiny_answers import Answer, assert_same, calling, generate_request
from tiny_cluster import WAIT_S, World, eventually, tokens

from spolia.v1 import common_pb2, decode_pb2
from spolia.v1.decode_pb2_grpc import DecodeServiceStub
from spolia_core.errors import Busy, InvalidRequest, Unavailable
from spolia_core.sampling import MAX_TOP_LOGPROBS, SamplingParams
from spolia_decode import answer_streams
from spolia_decode.answer_messages import delta_message
from spolia_decode.answer_streams import MAX_STEPS, AnswerStream, AnswerStreams
from spolia_decode.inbox import MAX_TOGETHER, Inbox
from spolia_decode.node import DecodeNode
from spolia_engine.generation import Delta
from spolia_engine.logprobs import TokenLogprobs
from spolia_node.calls import call_errors
from spolia_node.config import MIN_MESSAGE_BYTES

NAME = b"a gateway's stream"
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=300, ignore_eos=True)


@dataclass
class Reader:
    """Who reads a stream: answers by tag, and how many messages they took."""

    answers: dict[int, Answer] = field(default_factory=dict)
    num_messages: int = 0
    reading: asyncio.Task[None] | None = None

    async def read(self, call: Any) -> None:
        while (message := await call.read()) is not grpc.aio.EOF:
            self.num_messages += 1
            for tagged in message.steps:
                self.answers.setdefault(tagged.answer_tag, Answer()).take(tagged.step)


@asynccontextmanager
async def reading(node: DecodeNode, name: bytes = NAME) -> AsyncIterator[Reader]:
    async with grpc.aio.insecure_channel(node.server.address) as channel:
        call = DecodeServiceStub(channel).StreamAnswers(decode_pb2.StreamAnswersRequest(answer_stream=name))
        first = await asyncio.wait_for(call.read(), WAIT_S)
        assert not first.steps, "the first says that the stream is known"
        reader = Reader()
        reader.reading = asyncio.ensure_future(reader.read(call))
        try:
            yield reader
        finally:
            call.cancel()
            await asyncio.gather(reader.reading, return_exceptions=True)


async def ride(node: DecodeNode, seed: int, params: SamplingParams, stream: bytes = NAME) -> list[Any]:
    """Asks, and gives what comes on the call's own stream."""
    request = generate_request(node, [tokens(20 + seed, seed)], params, answer_stream=stream, answer_tag=seed)
    async with calling(node, request) as call:
        return [step async for step in call]


async def test_answers_side_by_side_come_whole_in_fewer_messages_than_tokens(world: World) -> None:
    await world.store()
    node = await world.decode()
    seeds = range(1, 9)
    async with reading(node) as reader:
        own = await asyncio.gather(*(ride(node, seed, GREEDY) for seed in seeds))
        assert own == [[] for _ in seeds], "the calls' own streams carry nothing"
        await eventually(lambda: sum(a.finish is not None for a in reader.answers.values()) == len(seeds))
        for seed in seeds:
            assert_same(reader.answers[seed], world.expect([tokens(20 + seed, seed)], GREEDY))
        assert reader.num_messages < len(seeds) * GREEDY.max_tokens / 2


@pytest.mark.parametrize("stream", [b"", b"nobody opened this"])
async def test_an_answer_that_no_stream_carries_comes_on_its_own_call(world: World, stream: bytes) -> None:
    node = await world.decode()
    answer = Answer()
    for step in await ride(node, 3, GREEDY, stream):
        answer.take(step)
    assert_same(answer, world.expect([tokens(23, 3)], GREEDY))


async def test_a_dropped_request_frees_its_memory_and_the_others_go_on(world: World) -> None:
    node = await world.decode()
    async with reading(node) as reader:
        staying = asyncio.ensure_future(ride(node, 1, ENDLESS))
        leaving = asyncio.ensure_future(ride(node, 2, ENDLESS))
        await eventually(lambda: {1, 2} <= reader.answers.keys())
        leaving.cancel()
        await eventually(lambda: node.admission.num_running == 1)
        await staying
        await eventually(lambda: reader.answers[1].finish is not None)
        assert reader.answers[2].finish is None
    await world.nothing_held()


async def test_a_reader_that_goes_ends_what_it_was_to_read(world: World) -> None:
    node = await world.decode()
    async with reading(node) as reader:
        riding = asyncio.ensure_future(ride(node, 1, ENDLESS))
        await eventually(lambda: 1 in reader.answers)
    with pytest.raises(Unavailable, match="stream"):
        await riding
    await world.nothing_held()
    async with reading(node):  # its name is free again
        pass


@pytest.mark.parametrize("name", [b"", b"short", b"l" * 65])
async def test_a_bad_name_is_refused(world: World, name: bytes) -> None:
    node = await world.decode()
    with pytest.raises(InvalidRequest) as caught, call_errors("decode"):
        async with reading(node, name):
            pass
    assert (caught.value.field, caught.value.limit) == ("answer_stream", "16 … 64 bytes")


async def test_a_name_in_use_is_refused(world: World) -> None:
    node = await world.decode()
    async with reading(node):
        with pytest.raises(InvalidRequest, match="in use"), call_errors("decode"):
            async with reading(node):
                pass


async def test_a_drain_waits_for_the_answers_and_not_for_the_stream(world: World) -> None:
    node = await world.decode()
    async with reading(node) as reader:
        riding = asyncio.ensure_future(ride(node, 1, SamplingParams(max_tokens=40, ignore_eos=True)))
        await eventually(lambda: 1 in reader.answers)
        assert await asyncio.wait_for(node.server.drain(), node.config.drain_timeout_s)
        assert await riding == []
        assert reader.answers[1].finish is not None
        assert reader.reading is not None
        await asyncio.wait_for(reader.reading, WAIT_S)


async def test_steps_that_wait_share_messages_of_bounded_size_and_a_finish_ends_its_message() -> None:
    stream = AnswerStream(decode_pb2.StreamAnswersResponse)
    messages = stream.messages()
    await anext(messages)
    for index in range(MAX_STEPS + 10):
        delta = common_pb2.TokenDelta(token_index=index)
        stream.post(index, decode_pb2.DecodeServiceGenerateResponse(delta=delta))
    for index in range(2):
        stream.post(index, decode_pb2.DecodeServiceGenerateResponse(finish=common_pb2.Finish()))
    sizes = [len((await anext(messages)).steps) for _ in range(3)]
    assert sizes == [MAX_STEPS, 11, 1]
    await messages.aclose()
    with pytest.raises(Unavailable):
        stream.post(0, decode_pb2.DecodeServiceGenerateResponse())


async def test_the_largest_steps_make_messages_that_every_node_takes() -> None:
    stream, inbox = AnswerStream(decode_pb2.StreamAnswersResponse), Inbox()
    messages = stream.messages()
    await anext(messages)
    told = TokenLogprobs(-1e-3, tuple((1 << 31, -20.0) for _ in range(MAX_TOP_LOGPROBS)))
    for index in range(MAX_TOGETHER * MAX_STEPS):
        inbox.put(Delta(index, (1 << 31,), "x" * 128, 128 * index, 0, (told,)))
    for _ in range(MAX_STEPS):
        delta = await inbox.take()
        assert delta is not None
        stream.post(1 << 63, decode_pb2.DecodeServiceGenerateResponse(delta=delta_message(delta)))
    message = await anext(messages)
    assert len(message.steps) == MAX_STEPS
    assert message.ByteSize() < MIN_MESSAGE_BYTES / 2


async def test_what_waits_is_bounded_in_bytes_and_a_reader_that_catches_up_in_time_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answer_streams, "MAX_WAITING_BYTES", 100_000)
    stream = AnswerStream(decode_pb2.StreamAnswersResponse)
    messages = stream.messages()
    await anext(messages)
    told, taken = 0, 0

    def tell(count: int) -> None:
        nonlocal told
        for _ in range(count):
            stream.tell(told, Delta(told, (7,), "x" * 100, 0, 0, ()))
            told += 1

    for _ in range(10):  # several times the bound goes through where it is taken
        tell(3 * MAX_STEPS)
        while stream._posted:
            taken += len((await anext(messages)).steps)
    assert taken == told
    assert (stream._waiting_bytes, len(stream._sizes)) == (0, 0)
    with pytest.raises(Unavailable, match="does not take them"):
        tell(10 * MAX_STEPS)
    assert 100_000 < (told - taken) * 113 < 200_000, "no sooner, and little later"
    assert not stream._posted, "what waited is forgotten"
    with pytest.raises(Unavailable, match="has ended"):
        tell(1)
    with pytest.raises(Busy) as caught:
        await anext(messages)
    assert caught.value.limit == "100000 bytes"


async def test_a_gateway_that_takes_nothing_loses_its_answers_and_their_memory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_streams, "MAX_WAITING_BYTES", 20_000)
    monkeypatch.setattr(answer_streams, "MAX_STEPS", 16)
    node = await world.decode()
    told = SamplingParams(max_tokens=300, ignore_eos=True, num_top_logprobs=MAX_TOP_LOGPROBS)
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 12)]  # little is taken unread
    async with grpc.aio.insecure_channel(node.server.address, options=options) as channel:
        call = DecodeServiceStub(channel).StreamAnswers(decode_pb2.StreamAnswersRequest(answer_stream=NAME))
        await asyncio.wait_for(call.read(), WAIT_S)
        riding = [asyncio.ensure_future(ride(node, seed, told)) for seed in range(1, 5)]
        ends = await asyncio.wait_for(asyncio.gather(*riding, return_exceptions=True), WAIT_S)
        assert all(isinstance(end, Unavailable) for end in ends), ends
        await world.nothing_held()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(Reader().read(call), WAIT_S)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "a gateway that does not take them" in (caught.value.details() or "")


async def test_a_stream_opened_while_draining_ends_with_its_last_rider() -> None:
    streams = AnswerStreams()
    await streams.drain(None)  # type: ignore[arg-type]  # it waits for nothing
    messages = streams.messages(NAME)
    await anext(messages)
    with streams.riding(NAME) as stream:
        assert stream is not None
        ending = asyncio.ensure_future(anext(messages, None))
        await asyncio.sleep(0.01)
        assert not ending.done()
    assert await asyncio.wait_for(ending, WAIT_S) is None
