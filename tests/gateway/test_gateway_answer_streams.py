"""Answers that come on one stream of a connection: as if each came on its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_fakes import UTF8_ANSWER, WAIT_S, FakeDecode, answers, fails_after, hangs
from gateway_worlds import Streamed, text_request, world
from streamed_fakes import known

from spolia.v1 import decode_pb2
from spolia_gateway import answer_streams

WHOLE = (list(UTF8_ANSWER.token_ids), UTF8_ANSWER.text_after[-1])


@dataclass
class SharedDecode(FakeDecode):
    """Sends what its script says on the stream that a request names. `hold` keeps steps back until it is set."""

    hold: asyncio.Event | None = None
    posted: dict[bytes, asyncio.Queue[decode_pb2.TaggedStep | None]] = field(default_factory=dict)
    num_opened: int = 0
    loses: Callable[[decode_pb2.TaggedStep], bool] = lambda step: False

    async def StreamAnswers(self, request: Any, context: Any) -> AsyncIterator[decode_pb2.StreamAnswersResponse]:
        self.num_opened += 1
        queue = self.posted[request.answer_stream] = asyncio.Queue()
        yield decode_pb2.StreamAnswersResponse()
        while (step := await queue.get()) is not None:
            steps = [step]
            while not queue.empty() and queue._queue[0] is not None:  # type: ignore[attr-defined]  # its own
                steps.append(queue.get_nowait())  # type: ignore[arg-type]  # looked at just now
            if self.hold is not None:
                await self.hold.wait()
            yield decode_pb2.StreamAnswersResponse(steps=[step for step in steps if not self.loses(step)])
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        queue = self.posted.get(request.answer_stream)
        async for step in super().Generate(request, context):
            if queue is None:
                yield step
            else:
                queue.put_nowait(decode_pb2.TaggedStep(answer_tag=request.answer_tag, step=step))
                await asyncio.sleep(0)

    def break_streams(self) -> None:
        for queue in self.posted.values():
            queue.put_nowait(None)


def is_whole(streamed: Streamed) -> bool:
    return (streamed.token_ids, streamed.text) == WHOLE and streamed.finish is not None


async def test_the_first_request_opens_the_stream_and_later_ones_name_it(model: Path) -> None:
    a = SharedDecode("a")
    async with world(model, decodes=[a]) as w:
        assert is_whole(await w.generate(text_request("the stones")))
        await known(w, a)
        for _ in range(3):
            assert is_whole(await w.generate(text_request("the stones")))
        assert a.requests[0].answer_stream == b""
        assert {request.answer_stream for request in a.requests[1:]} == set(a.posted)
        assert len({request.answer_tag for request in a.requests[1:]}) == 3
        assert a.num_opened == 1


async def test_each_of_many_at_once_gets_its_own_answer(model: Path) -> None:
    a = SharedDecode("a")
    async with world(model, decodes=[a]) as w:
        await known(w, a)
        streamed = await asyncio.gather(*(w.generate(text_request(f"stone {i}")) for i in range(32)))
        assert all(is_whole(each) for each in streamed)
        assert all(request.answer_stream for request in a.requests)


async def test_the_call_may_end_before_its_last_steps_have_come(model: Path) -> None:
    a = SharedDecode("a", hold=asyncio.Event())
    async with world(model, decodes=[a]) as w:
        await known(w, a)
        asking = asyncio.ensure_future(w.generate(text_request("the stones")))
        await asyncio.wait_for(a.ended.wait(), WAIT_S)
        await asyncio.sleep(0.05)
        assert not asking.done()
        assert a.hold is not None
        a.hold.set()
        assert is_whole(await asking)


AtFirstToken = Callable[[], object] | None


def _breaks(a: SharedDecode, monkeypatch: pytest.MonkeyPatch) -> AtFirstToken:
    a.script = hangs
    return a.break_streams


def _fails(a: SharedDecode, monkeypatch: pytest.MonkeyPatch) -> AtFirstToken:
    a.script = fails_after(3, grpc.StatusCode.UNAVAILABLE)
    return None


def _never_finishes(a: SharedDecode, monkeypatch: pytest.MonkeyPatch) -> AtFirstToken:
    monkeypatch.setattr(answer_streams, "LATE_S", 0.2)
    a.loses = lambda tagged: tagged.step.HasField("finish")
    return None


def _is_killed(a: SharedDecode, monkeypatch: pytest.MonkeyPatch) -> AtFirstToken:
    a.script = hangs
    return lambda: asyncio.ensure_future(a.server.stop(None))


@pytest.mark.parametrize("happens", [_breaks, _fails, _never_finishes, _is_killed])
async def test_an_answer_that_breaks_off_goes_on_elsewhere_with_nothing_lost_or_doubled(
    model: Path, happens: Callable[[SharedDecode, pytest.MonkeyPatch], AtFirstToken], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = SharedDecode("a"), SharedDecode("b")
    async with world(model, decodes=[a, b]) as w:
        await known(w, a, b)
        streamed = await w.generate(text_request("the stones"), at_first_token=happens(a, monkeypatch))
        assert is_whole(streamed)
        assert [len(a.requests), len(b.requests)] == [1, 1]
        assert b.requests[0].HasField("resume")
        assert streamed.finish is not None
        assert list(streamed.finish.reuse.nodes) == ["a", "b"]


async def test_a_lost_step_is_never_passed_over(model: Path) -> None:
    a = SharedDecode("a", loses=lambda tagged: tagged.step.delta.token_index == 2)
    async with world(model, decodes=[a]) as w:
        await known(w, a)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await w.generate(text_request("the stones"))
        assert caught.value.code() is grpc.StatusCode.INTERNAL


async def test_a_client_that_goes_ends_its_request_and_no_other(model: Path) -> None:
    a = SharedDecode("a", script=hangs)
    async with world(model, decodes=[a]) as w:
        await known(w, a)
        call = w.stub.Generate(text_request("the stones"), timeout=WAIT_S)
        assert (await call.read()).delta.token_ids
        a.script = answers
        assert is_whole(await w.generate(text_request("the stones")))
        assert a.num_running == 1
        call.cancel()
        await w.idle()
        streams = w.node.gateway._generator._answers
        assert not streams._streams[a.address].inboxes
        async with asyncio.timeout(WAIT_S):
            while a.num_running:  # noqa: ASYNC110 - no event for it
                await asyncio.sleep(0.005)


async def test_a_node_without_such_streams_answers_on_each_call_and_is_not_asked_again_at_once(model: Path) -> None:
    a = FakeDecode("a")
    async with world(model, decodes=[a]) as w:
        for _ in range(4):
            assert is_whole(await w.generate(text_request("the stones")))
        assert not any(request.answer_stream for request in a.requests)
        assert len(w.node.gateway._generator._answers._streams) == 1


async def test_a_stream_that_ended_is_opened_anew(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_streams, "PAUSE_S", 0.05)
    a = SharedDecode("a")
    async with world(model, decodes=[a]) as w:
        await known(w, a)
        a.break_streams()
        async with asyncio.timeout(WAIT_S):
            while a.address in w.node.gateway._generator._answers._streams:  # noqa: ASYNC110 - no event for it
                await asyncio.sleep(0.005)
        assert is_whole(await w.generate(text_request("the stones")))
        await known(w, a)
        assert is_whole(await w.generate(text_request("the stones")))
        assert a.num_opened == 2
        assert a.requests[-1].answer_stream == list(a.posted)[-1]


async def test_another_connection_has_a_stream_of_its_own_and_the_old_one_ends_with_its_last_answer(
    model: Path,
) -> None:
    a = SharedDecode("a", hold=asyncio.Event())
    async with world(model, decodes=[a]) as w:
        await known(w, a)
        asking = asyncio.ensure_future(w.generate(text_request("the stones")))
        await asyncio.wait_for(a.ended.wait(), WAIT_S)
        channels = w.node._channels
        (old,) = [key for key in channels._channels if key[0] == a.address]
        channels._retire(channels._channels.pop(old))  # as when a certificate was replaced
        await known(w, a)
        assert a.num_opened == 2
        assert a.hold is not None
        a.hold.set()
        assert is_whole(await asking)
        assert is_whole(await w.generate(text_request("the stones")))
        assert a.requests[-1].answer_stream == list(a.posted)[-1]


async def test_closing_ends_streams_of_older_connections_too(model: Path) -> None:
    a = SharedDecode("a")
    async with world(model, decodes=[a]) as w:
        await known(w, a)
        streams = w.node.gateway._generator._answers
        old = streams._streams[a.address]
        with streams.inbox(a.address):  # so it goes on when another takes its place
            channels = w.node._channels
            (key,) = [key for key in channels._channels if key[0] == a.address]
            channels._retire(channels._channels.pop(key))
            await known(w, a)
            assert old.is_retired
            assert old.reading is not None
            assert not old.reading.done()
            await streams.close()
            assert old.reading.done()


async def test_whatever_ends_a_call_is_heard_by_who_reads_its_answer() -> None:
    async def fails_oddly() -> AsyncIterator[Any]:
        yield decode_pb2.DecodeServiceGenerateResponse()
        raise ValueError("of no class that gRPC names")

    inbox = answer_streams.Inbox(b"a stream's name", 1)
    await inbox.follow(fails_oddly())
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(ValueError, match="names"):
            assert [step async for step in inbox.steps()] == []
