"""Requests that go on the stream of their answers: as if each were a call of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from captured_logs import captured_logs, one
from gateway_fakes import UTF8_ANSWER, WAIT_S, FakeDecode, answers, fails_after, hangs
from gateway_worlds import Streamed, World, ids_part, parts_request, text_request, world
from streamed_fakes import ManyDecode, known

from spolia.errors import error_from_rpc
from spolia.v1 import decode_pb2
from spolia_core.errors import Busy, DeadlineExceeded, Forbidden, InvalidRequest, SpoliaError, Unavailable
from spolia_gateway import answer_streams, backlog, outgoing
from spolia_gateway.asking import asked
from spolia_gateway.metrics import Asked
from spolia_node import tracing
from spolia_node.deadline import Deadline

WHOLE = (list(UTF8_ANSWER.token_ids), UTF8_ANSWER.text_after[-1])
REQUEST = text_request("the stones")


def is_whole(streamed: Streamed) -> bool:
    return (streamed.token_ids, streamed.text) == WHOLE and streamed.finish is not None


def num_asked(w: World) -> tuple[int, int]:
    """Requests that went on streams, and by calls."""
    value = w.node.server.metrics.value
    stream, call = (value("spolia_gateway_asked_total", way=way) for way in ("stream", "call"))
    return int(stream), int(call)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - no event for it
            await asyncio.sleep(0.005)


async def raised(w: World, request: Any = REQUEST, timeout: float = WAIT_S) -> SpoliaError:
    """What a client is told."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await w.generate(request, timeout)
    return error_from_rpc(caught.value)


async def test_the_first_request_opens_the_stream_and_later_ones_go_on_it(model: Path) -> None:
    a = ManyDecode("a")
    async with world(model, decodes=[a]) as w:
        assert is_whole(await w.generate(REQUEST))
        await known(w, a)
        for _ in range(3):
            assert is_whole(await w.generate(REQUEST))
        assert [len(a.requests), len(a.streamed), len(a.names)] == [4, 3, 1]
        assert len({each.request.answer_tag for each in a.streamed}) == 3
        assert num_asked(w) == (3, 1)
        assert not w.node.gateway._generator._answers._streams[a.address].inboxes
        assert not a.cancelled, "an answer that is whole is not cancelled"


async def test_what_a_call_would_bring_comes_beside_the_request(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = ManyDecode("a")
    parent = f"00-{'1' * 32}-{'2' * 16}-01"
    monkeypatch.setattr(outgoing, "trace_metadata", lambda: (("traceparent", parent), ("tracestate", "vendor=1")))
    async with world(model, decodes=[a]) as w:
        await known(w, a)
        assert is_whole(await w.generate(text_request("the stones", request_id="mine"), timeout=60.0))
        (streamed,) = a.streamed
        assert 40_000 < streamed.time_left_ms < 61_000  # gRPC rounds a client's deadline up
        assert (streamed.traceparent, streamed.tracestate) == (parent, "vendor=1")
        assert (streamed.request.request_id, streamed.request.tenant_id) == ("mine", "default")
        assert tracing.trace_metadata() == ()


async def test_each_of_many_at_once_gets_its_own_answer(model: Path) -> None:
    a = ManyDecode("a")
    async with world(model, decodes=[a]) as w:
        await known(w, a)
        streamed = await asyncio.gather(*(w.generate(text_request(f"stone {i}")) for i in range(32)))
        assert all(is_whole(each) for each in streamed)
        assert len(a.streamed) == 32
        assert num_asked(w) == (32, 0)


async def test_a_node_that_takes_nothing_gets_further_requests_by_calls(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outgoing, "MAX_WAITING_BYTES", 0)
    a = ManyDecode("a")
    async with world(model, decodes=[a]) as w:
        await known(w, a)
        assert is_whole(await w.generate(REQUEST))
        assert num_asked(w) == (0, 1)
        assert a.requests[0].answer_stream == a.names[0]


AtFirstToken = Callable[[], object] | None


def _breaks(a: ManyDecode) -> AtFirstToken:
    a.script = hangs
    return a.break_streams


def _fails(a: ManyDecode) -> AtFirstToken:
    a.script = fails_after(3, Unavailable("draining"))
    return None


def _is_killed(a: ManyDecode) -> AtFirstToken:
    a.script = hangs
    return lambda: asyncio.ensure_future(a.server.stop(None))


@pytest.mark.parametrize("happens", [_breaks, _fails, _is_killed])
async def test_an_answer_that_breaks_off_goes_on_elsewhere_with_nothing_lost_or_doubled(
    model: Path, happens: Callable[[ManyDecode], AtFirstToken]
) -> None:
    a, b = ManyDecode("a"), ManyDecode("b")
    async with world(model, decodes=[a, b]) as w:
        await known(w, a, b)
        streamed = await w.generate(REQUEST, at_first_token=happens(a))
        assert is_whole(streamed)
        assert [len(a.streamed), len(b.streamed)] == [1, 1]
        assert b.streamed[0].request.HasField("resume")
        assert streamed.finish is not None
        assert list(streamed.finish.reuse.nodes) == ["a", "b"]
        await until(lambda: a.num_running == 0)


async def test_all_that_a_broken_stream_carried_goes_on_elsewhere(model: Path) -> None:
    a, b = ManyDecode("a", script=hangs), ManyDecode("b")
    async with world(model, decodes=[a, b]) as w:
        await known(w, a, b)
        asking = [asyncio.ensure_future(w.generate(text_request(f"stone {i}"))) for i in range(8)]
        await until(lambda: a.num_running + sum(each.done() for each in asking) == 8)
        assert a.num_running >= 2
        a.break_streams()
        assert all(is_whole(each) for each in await asyncio.gather(*asking))
        await until(lambda: a.num_running == 0)


async def test_an_old_node_takes_over_from_a_new_one(model: Path) -> None:
    a, b = ManyDecode("a", script=hangs), FakeDecode("b")
    async with world(model, decodes=[a, b]) as w:
        await known(w, a)
        assert is_whole(await w.generate(REQUEST, at_first_token=a.break_streams))
        assert [len(a.streamed), len(b.requests)] == [1, 1]
        assert not b.requests[0].answer_stream
        assert num_asked(w) == (1, 1)


async def test_a_node_that_refuses_is_passed_over(model: Path) -> None:
    a, b = ManyDecode("a", script=fails_after(0, Busy("full", retry_after_ms=700))), ManyDecode("b")
    async with world(model, decodes=[a, b]) as w:
        await known(w, a, b)
        assert is_whole(await w.generate(REQUEST))
        assert [len(a.streamed), len(b.streamed)] == [1, 1]
        assert not b.streamed[0].request.HasField("resume")


async def test_a_refusal_comes_to_the_client_whole(model: Path) -> None:
    refusal = InvalidRequest("too much", field="sampling.max_tokens", limit="8 tokens", actual="9 tokens")
    a = ManyDecode("a", script=fails_after(0, refusal))
    async with world(model, decodes=[a]) as w:
        await known(w, a)
        told = await raised(w)
        assert isinstance(told, InvalidRequest)
        assert (told.message, told.field, told.limit, told.actual) == (
            "too much",
            "sampling.max_tokens",
            "8 tokens",
            "9 tokens",
        )
        a.script = fails_after(0, Busy("full", retry_after_ms=700))
        busy = await raised(w)
        assert isinstance(busy, Busy)
        assert busy.retry_after_ms == 700
        a.script = answers
        assert is_whole(await w.generate(REQUEST)), "the stream goes on"
        assert [len(a.streamed), len(a.names)] == [3, 1]
        assert not a.cancelled


async def test_a_node_that_refuses_this_one_is_as_good_as_away(model: Path) -> None:
    a = ManyDecode("a", script=fails_after(0, Forbidden("not for you")))
    async with world(model, decodes=[a]) as w:
        await known(w, a)
        with captured_logs() as lines:
            told = await raised(w)
        assert isinstance(told, Unavailable)
        assert "refuses this gateway" in told.message
        assert "refuses this node; look at its certificates: not for you" in one(lines, "attempt failed")["said"]


async def test_a_client_that_goes_ends_its_request_and_no_other(model: Path) -> None:
    a = ManyDecode("a", script=hangs)
    async with world(model, decodes=[a]) as w:
        await known(w, a)
        call = w.stub.Generate(REQUEST, timeout=WAIT_S)
        assert (await call.read()).delta.token_ids
        a.script = answers
        assert is_whole(await w.generate(REQUEST))
        assert a.num_running == 1
        call.cancel()
        await w.idle()
        assert not w.node.gateway._generator._answers._streams[a.address].inboxes
        await until(lambda: a.num_running == 0)
        assert a.cancelled == [a.streamed[0].request.answer_tag]


async def test_a_request_that_runs_out_of_time_ends_here_and_there(model: Path) -> None:
    a = ManyDecode("a", script=hangs)
    async with world(model, decodes=[a]) as w:
        await known(w, a)
        told = await raised(w, text_request("the stones"), timeout=1.0)
        assert isinstance(told, DeadlineExceeded)
        await until(lambda: a.num_running == 0)
        assert a.cancelled == [a.streamed[0].request.answer_tag]
        a.script = answers
        assert is_whole(await w.generate(REQUEST))


async def test_a_node_that_says_nothing_in_time_is_given_up_by_the_gateways_own_clock(model: Path) -> None:
    a = ManyDecode("a", script=hangs)
    async with world(model, decodes=[a], default_timeout_s=0.3) as w:
        await known(w, a)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in w.stub.Generate(REQUEST):  # the client has no deadline of its own
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "ran out of time" in (caught.value.details() or "")
        await until(lambda: a.num_running == 0)


async def test_a_long_request_goes_by_a_call_that_names_the_stream(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outgoing, "MAX_REQUEST_BYTES", 150)
    a = ManyDecode("a")
    async with world(model, decodes=[a]) as w:
        await known(w, a)
        assert is_whole(await w.generate(parts_request(ids_part(*[300] * 100))))
        assert is_whole(await w.generate(parts_request(ids_part(3))))
        assert [len(a.requests), len(a.streamed)] == [2, 1]
        assert a.requests[0].answer_stream == a.names[0]
        assert num_asked(w) == (1, 1)


async def test_a_reader_that_is_too_slow_ends_its_request_at_the_node(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_streams, "MAX_WAITING", 2)
    monkeypatch.setattr(backlog, "MAX_BACKLOG_BYTES", 10)

    a = ManyDecode("a", script=hangs)
    async with world(model, decodes=[a]) as w:
        await known(w, a)
        request = decode_pb2.DecodeServiceGenerateRequest()
        with w.node.gateway._generator._answers.inbox(a.address) as inbox:
            request.answer_tag = inbox.tag
            channel = w.node._channels.get(a.address, "decode")
            async with asked(channel, inbox, request, Deadline.after(WAIT_S)) as how:
                assert how is Asked.STREAM
                await until(lambda: a.num_running == 1)
                for step in UTF8_ANSWER.deltas(None):
                    inbox.take(step)
                assert inbox.pace is backlog.Pace.ENDED
                await until(lambda: a.cancelled == [inbox.tag])
                with pytest.raises(backlog.ReaderTooSlow):
                    async for _ in inbox.steps():
                        pass
        await until(lambda: a.num_running == 0)


async def test_a_request_that_nobody_wants_any_more_is_not_sent() -> None:
    out = outgoing.Outgoing(b"a stream's name ")
    messages = out.messages()
    assert (await anext(messages)).answer_stream == b"a stream's name "
    for tag in (1, 2, 3):
        request = decode_pb2.DecodeServiceGenerateRequest(answer_tag=tag)
        out.ask(request, request.ByteSize(), Deadline.after(5.0))
    out.cancel(2)
    out.cancel(9)  # was sent before
    message = await anext(messages)
    assert [each.request.answer_tag for each in message.requests] == [1, 3]
    assert list(message.cancelled_tags) == [9]
    waiting = asyncio.ensure_future(anext(messages, None))
    await asyncio.sleep(0)
    assert not waiting.done()
    out.close()
    assert await asyncio.wait_for(waiting, WAIT_S) is None


async def test_messages_and_what_waits_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "MAX_REQUEST_BYTES", 100)
    monkeypatch.setattr(outgoing, "MAX_WAITING_BYTES", 250)
    out = outgoing.Outgoing(b"a stream's name ")
    messages = out.messages()
    await anext(messages)
    assert not out.has_room_for(101)
    num_taken = 0
    while out.has_room_for(40):
        num_taken += 1
        out.ask(decode_pb2.DecodeServiceGenerateRequest(answer_tag=num_taken), 40, Deadline.after(5.0))
    assert num_taken == 6
    sizes = [len((await anext(messages)).requests) for _ in range(3)]
    assert sizes == [2, 2, 2]
    assert out.has_room_for(100)


async def test_a_message_has_no_more_requests_and_cancels_than_a_node_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "MAX_TOGETHER", 3)
    out = outgoing.Outgoing(b"a stream's name ")
    messages = out.messages()
    await anext(messages)
    for tag in range(1, 8):
        out.ask(decode_pb2.DecodeServiceGenerateRequest(answer_tag=tag), 4, Deadline.after(5.0))
        out.cancel(100 + tag)
    sizes = [(len(m.requests), len(m.cancelled_tags)) for m in [await anext(messages) for _ in range(3)]]
    assert sizes == [(3, 3), (3, 3), (1, 1)]


async def test_time_that_a_request_waited_here_is_not_given_to_the_node() -> None:
    out = outgoing.Outgoing(b"a stream's name ")
    messages = out.messages()
    await anext(messages)
    for tag, left_s in ((1, 60.0), (2, 0.0)):
        out.ask(decode_pb2.DecodeServiceGenerateRequest(answer_tag=tag), 4, Deadline.after(left_s))
    await asyncio.sleep(0.1)
    waited, late = (await anext(messages)).requests
    assert 30_000 <= waited.time_left_ms <= 59_900
    assert late.time_left_ms == 1, "0 would be the node's default"
