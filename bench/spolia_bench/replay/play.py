"""Asks a trace's requests when they are due, and notes what came of each."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from spolia import Result, ReuseMode, TokenIds
from spolia.answers import Answer
from spolia.connection import DEFAULT_MAX_MESSAGE_BYTES, channel_options
from spolia.prompts import prompt_of
from spolia.requests import RequestBuilder
from spolia.v1.common_pb2 import Timings
from spolia.v1.gateway_pb2_grpc import GatewayServiceStub
from spolia_bench.replay.tokens import prompt_token_ids
from spolia_bench.replay.trace import Trace, TraceRequest

if TYPE_CHECKING:
    from spolia.v1.gateway_pb2_grpc import GatewayServiceAsyncStub


@dataclass(frozen=True, slots=True)
class Played:
    """A request that was answered. `late_ms` is how long after it was due it was sent: its session was not ready.

    `queue_ms` is from its arrival at the decode node to its place there; `wait_ms` its TTFT less what the engine took:
    every queue on its way, fetches and hand-overs.
    """

    result: Result
    queue_ms: float
    wait_ms: float
    late_ms: float


@dataclass(slots=True)
class Outcome:
    """Answers in order of completion, and how many requests ended with which status instead."""

    played: list[Played] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    duration_s: float = 0.0


async def play(address: str, trace: Trace, vocab_size: int, timeout_s: float) -> Outcome:
    """Sends every request at its time over one connection, EXACT, as token ids."""
    outcome = Outcome()
    sessions: dict[str, asyncio.Lock] = {}
    builder = RequestBuilder(timeout_s, "", DEFAULT_MAX_MESSAGE_BYTES)
    async with grpc.aio.insecure_channel(address, options=channel_options(address)) as channel:
        stub: GatewayServiceAsyncStub = GatewayServiceStub(channel)
        started_s = time.monotonic()

        async def ask(number: int, request: TraceRequest) -> None:
            due_s = started_s + request.at_s
            await asyncio.sleep(due_s - time.monotonic())
            # A lock serves in order of arrival, and requests come by time.
            lock = asyncio.Lock() if request.session is None else sessions.setdefault(request.session, asyncio.Lock())
            async with lock:
                late_ms = max(0.0, time.monotonic() - due_s) * 1e3
                tokens = prompt_token_ids(request, number, trace.block_tokens, vocab_size)
                try:
                    result, timings = await _generate(stub, builder, tokens, request.num_output_tokens)
                except grpc.aio.AioRpcError as error:
                    outcome.failures[error.code().name] = outcome.failures.get(error.code().name, 0) + 1
                else:
                    wait_ms = result.ttft_ms - timings.compute_ms
                    outcome.played.append(Played(result, timings.queue_ms, wait_ms, late_ms))

        async with asyncio.TaskGroup() as tasks:
            for number, request in enumerate(trace.requests):
                tasks.create_task(ask(number, request))
        outcome.duration_s = time.monotonic() - started_s
    return outcome


async def _generate(
    stub: GatewayServiceAsyncStub, builder: RequestBuilder, token_ids: list[int], max_tokens: int
) -> tuple[Result, Timings]:
    """As the SDK does, but for the node's own times, which its `Result` leaves out."""
    sent_s = time.monotonic()
    # Without a begin-of-sequence token in front, blocks of the trace and of the cache begin together.
    prompt = prompt_of(TokenIds(token_ids))
    outgoing = builder.generate(
        prompt, mode=ReuseMode.EXACT, max_tokens=max_tokens, ignore_eos=True, no_bos=True, seed=0
    )
    answer, timings = Answer(outgoing.request_id, sent_s), Timings()
    call = stub.Generate(outgoing.request, timeout=outgoing.timeout_s, metadata=outgoing.metadata)
    async for response in call:
        answer.add(response, time.monotonic())
        if response.HasField("finish"):
            timings = response.finish.timings
    return answer.result(), timings
