"""A reader who is behind: it gets the same answer in fewer steps, or a typed end; memory stays bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_fakes import WAIT_S, FakeDecode, delta, finish
from gateway_worlds import LAWFUL, text_request, world
from http_worlds import http_world, says
from hypothesis import given
from hypothesis import strategies as st

from spolia.v1 import common_pb2, decode_pb2
from spolia_core.errors import InternalError
from spolia_gateway.answer_streams import MAX_WAITING, Inbox
from spolia_gateway.backlog import MAX_BACKLOG_BYTES, MAX_STEP_BYTES, Pace, ReaderTooSlow
from spolia_gateway.received import Received

Step = decode_pb2.DecodeServiceGenerateResponse
WORD = " Wörter"


def sampled(sample_index: int, index: int) -> Step:
    told = common_pb2.TokenLogprobs(logprob=-index, top=[common_pb2.TopLogprob(token_id=index, logprob=-1)])
    step = delta(index, [1000 + index], WORD, index * len(WORD))
    step.delta.sample_index = sample_index
    step.delta.logprobs.append(told)
    return step


async def rest_of(inbox: Inbox) -> list[Step]:
    return [step async for step in inbox.steps()]


@LAWFUL
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=400))
async def test_who_reads_at_whatever_pace_gets_the_same_answer(moves: list[tuple[int, bool]]) -> None:
    inbox, received, num_put = Inbox(b"x", 1), Received(4), [0] * 4
    told: list[list[float]] = [[] for _ in range(4)]

    def take(step: Step) -> None:
        received.take(step.delta)
        told[step.delta.sample_index] += [each.logprob for each in step.delta.logprobs]

    steps = inbox.steps()
    for sample_index, reads in moves:
        inbox.put(sampled(sample_index, num_put[sample_index]))
        num_put[sample_index] += 1
        if reads:
            take(await anext(steps))
    inbox.put(finish("d0", sum(num_put)))
    inbox.put(None)
    async for step in steps:
        if step.HasField("finish"):
            assert step.finish.num_generated_tokens == received.num_tokens
        else:
            take(step)
    for sample, logprobs, count in zip(received.samples, told, num_put, strict=True):
        assert sample.token_ids == [1000 + index for index in range(count)]
        assert sample.num_code_points == count * len(WORD)
        assert logprobs == [-index for index in range(count)]


async def test_what_waits_is_put_together_in_steps_of_bounded_size() -> None:
    inbox = Inbox(b"x", 1)
    for index in range(5000):
        inbox.put(sampled(0, index))
    assert inbox.pace is Pace.BEHIND
    inbox.put(finish("d0", 5000))
    inbox.put(None)
    steps = await rest_of(inbox)
    assert len(steps) < MAX_WAITING + 100
    assert max(step.ByteSize() for step in steps) < MAX_STEP_BYTES + 16


async def test_a_reader_that_keeps_up_gets_each_step_as_it_came() -> None:
    inbox = Inbox(b"x", 1)
    steps = inbox.steps()
    for index in range(3 * MAX_WAITING):
        step = sampled(0, index)
        inbox.put(step)
        assert await anext(steps) is step
    assert inbox.pace is Pace.KEPT_UP


async def test_a_lost_step_is_seen_behind_a_backlog_too() -> None:
    inbox, received = Inbox(b"x", 1), Received()
    for index in range(3 * MAX_WAITING):
        if index != 2 * MAX_WAITING:
            inbox.put(sampled(0, index))
    inbox.put(finish("d0", 3 * MAX_WAITING))
    inbox.put(None)
    deltas = [step.delta for step in await rest_of(inbox)]
    with pytest.raises(InternalError, match="goes on at"):
        _ = [received.take(delta) for delta in deltas]


async def test_too_much_that_waits_gives_way_to_an_error() -> None:
    inbox = Inbox(b"x", 1)
    big = sampled(0, 0)
    big.delta.text = "x" * 65536
    for _ in range(MAX_BACKLOG_BYTES // 65536 + MAX_WAITING + 1):
        inbox.put(big)
    assert inbox.pace is Pace.ENDED
    with pytest.raises(ReaderTooSlow, match="too slowly"):
        await rest_of(inbox)
    for _ in range(2 * MAX_WAITING):
        inbox.put(big)
    assert inbox.pace is Pace.ENDED


async def floods(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
    text = "x" * 65536
    for index in range(100_000):
        yield delta(index, (70,), text, index * len(text))


async def test_a_client_that_does_not_read_is_ended_with_a_cause_and_counted(model: Path) -> None:
    decode = FakeDecode("d0", floods)
    async with world(model, decodes=[decode]) as w:
        call = w.stub.Generate(text_request("the stones"), timeout=WAIT_S)
        await asyncio.wait_for(decode.ended.wait(), WAIT_S)  # at once, not when the client reads again
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        assert caught.value.code() is grpc.StatusCode.CANCELLED
        assert "reads its answer too slowly" in (caught.value.details() or "")
        count = w.node.server.metrics.registry.get_sample_value
        labels = {"way": "own", "reader": "ended"}
        assert count("spolia_gateway_answers_total", labels) == 1


async def test_a_client_over_http_that_does_not_read_gets_the_cause_as_its_last_event(model: Path) -> None:
    decode = FakeDecode("d0", floods)
    async with http_world(model, [decode]) as met:
        body = {"prompt": "x", "stream": True, "max_tokens": 200}
        async with met.http.stream("POST", "/v1/completions", json=body) as response:
            await asyncio.wait_for(decode.ended.wait(), WAIT_S)
            events = [line async for line in response.aiter_lines() if line]
    assert '"code":"cancelled"' in events[-1]
    assert "too slowly" in events[-1]


async def test_ways_and_paces_are_counted(model: Path) -> None:
    async with http_world(model, [FakeDecode("d0", says)]) as met:
        for way in ("own", "shared"):
            for reader in ("kept_up", "behind", "ended"):
                name = f'spolia_gateway_answers_total{{reader="{reader}",way="{way}"}}'
                assert await met.metric(name) == f"{name} 0.0", "it is there before the first request"
        assert (await met.http.post("/v1/completions", json={"prompt": "x"})).status_code == 200
        name = 'spolia_gateway_answers_total{reader="kept_up",way="own"}'
        assert await met.metric(name) == f"{name} 1.0"
