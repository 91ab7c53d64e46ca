"""Requests on one stream: each as a call of its own would be, whatever becomes of the others."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from streamed_asking import ENDLESS, GREEDY, NAME, asking, prompt
from tiny_answers import assert_same, calling, generate_request
from tiny_cluster import WAIT_S, World, eventually, held_engine, tokens

from spolia.v1 import decode_pb2
from spolia.v1.decode_pb2_grpc import DecodeServiceStub
from spolia_core.errors import InvalidRequest
from spolia_core.sampling import SamplingParams
from spolia_decode.node import DecodeNode
from spolia_decode.streamed_requests import MAX_TOGETHER
from spolia_node.calls import call_errors
from spolia_node.edges import callers_of
from spolia_node.tracing import Metadata, Span

METHOD = "/spolia.v1.DecodeService/Generate"


def num_calls(node: DecodeNode, code: str) -> float:
    """Calls of Generate that ended so, as its metrics have it."""
    service, method = "spolia.v1.DecodeService", "Generate"
    return node.server.metrics.value("spolia_rpc_requests_total", service=service, method=method, code=code)


async def read_to_its_end(call: Any) -> None:
    """Raises how it ended."""
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_many_are_answered_side_by_side_and_counted_as_calls(world: World) -> None:
    node = await world.decode()
    tags = range(1, 9)
    async with asking(node) as asker:
        await asker.say(requests=[asker.streamed(tag) for tag in tags[:4]])
        for tag in tags[4:]:
            await asker.ask(tag)
        await asker.finished(*tags)
        for tag in tags:
            assert_same(asker.answers[tag], world.expect(prompt(tag), GREEDY))
        assert not asker.failures
        await eventually(lambda: num_calls(node, "OK") == len(tags))
    await world.nothing_held()


async def test_one_that_fails_says_why_and_the_others_go_on(world: World) -> None:
    node = await world.decode()
    async with asking(node) as asker:
        bad = asker.streamed(2)
        bad.request.fingerprint = bytes(32)
        worse = asker.streamed(3)
        worse.request.sampling.temperature = -1.0
        await asker.say(requests=[asker.streamed(1), bad, worse])
        await asker.finished(1)
        await eventually(lambda: asker.failures.keys() == {2, 3})
        codes = {tag: failure.code for tag, failure in asker.failures.items()}
        assert codes == {2: grpc.StatusCode.FAILED_PRECONDITION.value[0], 3: grpc.StatusCode.INVALID_ARGUMENT.value[0]}
        assert (asker.failures[2].detail.kind, asker.failures[2].detail.field) == ("NotSupported", "fingerprint")
        assert asker.failures[3].detail.field == "sampling.temperature"
        assert "temperature" in asker.failures[3].message
        assert [num_calls(node, code) for code in ("OK", "FAILED_PRECONDITION", "INVALID_ARGUMENT")] == [1, 1, 1]
        await asker.ask(4)
        await asker.finished(4)
    await world.nothing_held()


async def test_what_nobody_expected_is_told_to_the_one_it_befell(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await world.decode()

    def check_job(request: decode_pb2.DecodeServiceGenerateRequest, *more: Any) -> Any:
        if request.answer_tag == 2:
            raise ValueError("nobody expects this")
        return known(request, *more)

    from spolia_decode import server

    known = server.check_job
    monkeypatch.setattr(server, "check_job", check_job)
    async with asking(node) as asker:
        await asker.say(requests=[asker.streamed(1), asker.streamed(2)])
        await asker.finished(1)
        await eventually(lambda: 2 in asker.failures)
        assert asker.failures[2].code == grpc.StatusCode.INTERNAL.value[0]
        assert "ValueError" in asker.failures[2].message


async def test_a_cancelled_one_frees_its_memory_and_is_not_heard_of_again(world: World) -> None:
    node = await world.decode()
    async with asking(node) as asker:
        await asker.say(requests=[asker.streamed(1, ENDLESS), asker.streamed(2, ENDLESS)])
        await eventually(lambda: {1, 2} <= asker.answers.keys())
        await asker.say(cancelled_tags=[2])
        await eventually(lambda: node.admission.num_running == 1)
        await eventually(lambda: num_calls(node, "CANCELLED") == 1)
        await asker.finished(1)
        assert asker.answers[2].finish is None
        assert not asker.failures
    await world.nothing_held()


async def test_a_cancel_of_what_has_ended_or_has_just_come_is_no_matter(world: World) -> None:
    node = await world.decode()
    async with asking(node) as asker:
        await asker.ask(1)
        await asker.finished(1)
        await asker.say(cancelled_tags=[1, 77], requests=[asker.streamed(2)])
        await asker.finished(2)
        await asker.say(requests=[asker.streamed(3, ENDLESS)], cancelled_tags=[3])
        await asker.say(requests=[asker.streamed(4)])
        await asker.finished(4)
        assert 3 not in asker.answers
        await asker.ask(3)  # its tag is free again
        await asker.finished(3)
    await world.nothing_held()


async def test_a_caller_that_goes_ends_all_that_it_asked(world: World) -> None:
    node = await world.decode()
    async with asking(node) as asker:
        await asker.say(requests=[asker.streamed(tag, ENDLESS) for tag in (1, 2)])
        await eventually(lambda: {1, 2} <= asker.answers.keys())
    await eventually(lambda: num_calls(node, "CANCELLED") == 2)
    await world.nothing_held()
    async with asking(node):  # its name is free again
        pass


async def test_a_caller_that_says_no_more_hears_the_rest(world: World) -> None:
    node = await world.decode()
    async with asking(node) as asker:
        await asker.say(requests=[asker.streamed(tag) for tag in (1, 2)])
        await asker.call.done_writing()
        await asker.ended()
        for tag in (1, 2):
            assert_same(asker.answers[tag], world.expect(prompt(tag), GREEDY))


async def test_each_has_the_time_it_came_with(world: World) -> None:
    node = await world.decode()
    async with asking(node) as asker:
        with held_engine(node.thread):
            await asker.say(
                requests=[
                    asker.streamed(1, time_left_ms=100),
                    asker.streamed(2, time_left_ms=60_000),
                    asker.streamed(3),
                ]
            )
            await eventually(lambda: 1 in asker.failures)
            assert asker.failures[1].code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
            assert asker.failures[1].detail.kind == "DeadlineExceeded"
        await asker.finished(2, 3)
        assert asker.failures.keys() == {1}
    await world.nothing_held()


async def test_no_place_is_told_with_when_to_come_back(world: World) -> None:
    node = await world.decode(max_running=1, max_waiting=0)
    async with asking(node) as asker:
        await asker.ask(1, ENDLESS)
        await eventually(lambda: 1 in asker.answers)
        await asker.ask(2)
        await eventually(lambda: 2 in asker.failures)
        assert asker.failures[2].code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert asker.failures[2].detail.retry_after_ms > 0


async def test_a_tag_in_use_ends_the_stream_and_frees_everything(world: World) -> None:
    node = await world.decode()
    async with asking(node) as asker:
        await asker.ask(1, ENDLESS)
        await eventually(lambda: 1 in asker.answers)
        await asker.ask(1)
        with pytest.raises(InvalidRequest) as caught, call_errors("decode"):
            await asker.ended()
        assert caught.value.field == "answer_tag"
    await world.nothing_held()


@pytest.mark.parametrize("field", ["requests", "cancelled_tags"])
async def test_too_many_at_once_end_the_stream_before_any_of_them_begins(world: World, field: str) -> None:
    node = await world.decode()
    async with asking(node) as asker:
        if field == "requests":
            await asker.say(requests=[asker.streamed(1)] + [decode_pb2.StreamedRequest()] * MAX_TOGETHER)
        else:
            await asker.say(requests=[asker.streamed(1)], cancelled_tags=range(MAX_TOGETHER + 1))
        with pytest.raises(InvalidRequest) as caught, call_errors("decode"):
            await asker.ended()
        assert caught.value.field == field
        assert not asker.answers


async def test_bytes_that_are_no_message_end_the_stream_and_free_everything(world: World) -> None:
    node = await world.decode()
    async with grpc.aio.insecure_channel(node.server.address) as channel:
        call = channel.stream_stream("/spolia.v1.DecodeService/GenerateMany")()
        await call.write(decode_pb2.GenerateManyRequest(answer_stream=NAME).SerializeToString())
        assert await asyncio.wait_for(call.read(), WAIT_S) == b""
        request = generate_request(node, prompt(1), ENDLESS, answer_tag=1)
        streamed = decode_pb2.StreamedRequest(request=request)
        await call.write(decode_pb2.GenerateManyRequest(requests=[streamed]).SerializeToString())
        assert await asyncio.wait_for(call.read(), WAIT_S)
        await call.write(b"\xff\xff\xff")
        with pytest.raises(InvalidRequest, match="GenerateManyRequest"), call_errors("decode"):
            await read_to_its_end(call)
    await world.nothing_held()


@pytest.mark.parametrize("name", [b"", b"short", b"l" * 65])
async def test_a_bad_name_is_refused(world: World, name: bytes) -> None:
    node = await world.decode()
    with pytest.raises(InvalidRequest) as caught, call_errors("decode"):
        async with asking(node, name):
            pass
    assert (caught.value.field, caught.value.limit) == ("answer_stream", "16 … 64 bytes")


async def test_a_name_in_use_is_refused(world: World) -> None:
    node = await world.decode()
    async with asking(node):
        with pytest.raises(InvalidRequest, match="in use"), call_errors("decode"):
            async with asking(node):
                pass


async def test_a_stream_that_says_nothing_ends_in_time(world: World) -> None:
    node = await world.decode(rpc_timeout_s=0.1)
    async with grpc.aio.insecure_channel(node.server.address) as channel:
        call = DecodeServiceStub(channel).GenerateMany()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(read_to_its_end(call), WAIT_S)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_call_may_have_its_answer_on_the_stream_too(world: World) -> None:
    node = await world.decode()
    async with asking(node) as asker:
        request = generate_request(node, prompt(5), GREEDY, answer_stream=NAME, answer_tag=5)
        async with calling(node, request) as call:
            assert [step async for step in call] == []
        await asker.finished(5)
        assert_same(asker.answers[5], world.expect(prompt(5), GREEDY))


async def test_a_request_on_a_stream_is_answered_there_whatever_stream_it_names(world: World) -> None:
    node = await world.decode()
    async with asking(node) as asker, asking(node, b"another gateway's") as other:
        streamed = asker.streamed(1)
        streamed.request.answer_stream = b"another gateway's"
        await asker.say(requests=[streamed])
        await asker.finished(1)
        assert not other.answers


async def test_a_drain_answers_what_runs_refuses_what_comes_and_ends_the_stream(world: World) -> None:
    node = await world.decode()
    async with asking(node) as asker:
        await asker.ask(1, SamplingParams(max_tokens=60, ignore_eos=True))
        await eventually(lambda: 1 in asker.answers)
        with held_engine(node.thread):
            draining = asyncio.ensure_future(node.server.drain())
            await eventually(lambda: not node.server.accepting)
            await asker.ask(2)
            await eventually(lambda: 2 in asker.failures)
            assert asker.failures[2].code == grpc.StatusCode.UNAVAILABLE.value[0]
            assert asker.failures[2].detail.kind == "Unavailable"
        assert await asyncio.wait_for(draining, node.config.drain_timeout_s)
        await asker.ended()
        assert asker.answers[1].finish is not None


async def test_a_drain_that_is_out_of_patience_cuts_what_runs(world: World) -> None:
    node = await world.decode(drain_timeout_s=0.2)
    async with asking(node) as asker:
        await asker.ask(1, ENDLESS)
        await eventually(lambda: 1 in asker.answers)
        with held_engine(node.thread):
            await asyncio.wait_for(node.server.drain(), WAIT_S)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asker.ended()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert num_calls(node, "UNAVAILABLE") == 1
    await world.nothing_held()


async def test_each_goes_on_with_the_trace_it_came_with(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await world.decode()
    entered: list[tuple[str, dict[str, str]]] = []

    def enter(method: str, metadata: Metadata) -> Span:
        entered.append((method, {key: str(value) for key, value in metadata}))
        return Span()

    monkeypatch.setattr(node.server._interceptor, "_enter_span", enter)
    async with asking(node) as asker:
        parent = f"00-{'1' * 32}-{'2' * 16}-01"
        await asker.ask(1, traceparent=parent, tracestate="vendor=1")
        await asker.ask(2)
        await asker.finished(1, 2)
    told = [metadata for method, metadata in entered if method == METHOD]
    assert told == [{"traceparent": parent, "tracestate": "vendor=1"}, {}]


async def test_the_stream_is_for_those_who_may_call() -> None:
    assert callers_of("/spolia.v1.DecodeService/GenerateMany") == callers_of(METHOD) == {"gateway"}


async def test_samples_of_a_request_come_whole(world: World) -> None:
    node = await world.decode()
    params = SamplingParams(max_tokens=6, ignore_eos=True, temperature=1.0, seed=5, num_samples=3)
    own_ids: dict[int, list[int]] = {}
    async with calling(node, generate_request(node, [tokens(30, 3)], params)) as call:
        async for step in call:
            own_ids.setdefault(step.delta.sample_index, []).extend(step.delta.token_ids)
    seen: dict[int, list[int]] = {}
    async with asking(node) as asker:
        assert asker.reading is not None
        asker.reading.cancel()
        await asyncio.gather(asker.reading, return_exceptions=True)
        await asker.ask(1, params, [tokens(30, 3)])
        finish = None
        async for message in asker.call:
            for tagged in message.steps:
                if tagged.step.HasField("finish"):
                    finish = tagged.step.finish
                else:
                    seen.setdefault(tagged.step.delta.sample_index, []).extend(tagged.step.delta.token_ids)
            if finish is not None:
                break
    assert seen == {index: ids for index, ids in own_ids.items() if ids}
    assert finish is not None
    assert finish.num_generated_tokens == 18
