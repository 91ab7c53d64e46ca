"""The same answers three ways: from the engine alone, through the gateway over gRPC, and over HTTP."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc

from spolia.connection import channel_options
from spolia.v1 import decode_pb2, gateway_pb2, gateway_pb2_grpc
from spolia.v1.common_pb2 import REUSE_MODE_EXACT, TokenPart
from spolia_bench.gateway.questions import Asked
from spolia_bench.gateway.timing import StreamTime, WrongAnswer
from spolia_decode.config import DecodeConfig
from spolia_decode.node import DecodeNode
from spolia_decode.server import DecodeServer
from spolia_engine.engine import Engine

TIMEOUT_S = 600.0

Way = Callable[[Asked], Awaitable[StreamTime]]
"""Asks, and reads the answer to its end."""


@asynccontextmanager
async def engine_alone(engine: Engine, config: DecodeConfig) -> AsyncIterator[Way]:
    """A decode node's engine with its scheduler, asked in this process: no gateway, and no bytes on a wire."""
    node = DecodeNode(config, engine)
    await node.start()
    server = DecodeServer(node.parts, node.batch, node.admission, lambda: None, node.server.run_inside)

    async def ask(asked: Asked) -> StreamTime:
        request = decode_pb2.DecodeServiceGenerateRequest(
            tenant_id="default",
            fingerprint=engine.adapter.fingerprint,
            parts=[TokenPart(token_ids=asked.token_ids)],
            mode=REUSE_MODE_EXACT,
            sampling=asked.sampling,
        )
        sent = time.perf_counter()
        context: Any = _NoWire()
        return await _timed(sent, server.Generate(request, context))

    try:
        yield ask
    finally:
        await node.server.stop_at_once()
        await node.close()


async def _timed(sent: float, events: AsyncIterable[Any]) -> StreamTime:
    """Reads an answer to its finish."""
    first, end, num_tokens = 0.0, 0.0, 0
    async for event in events:
        end = time.perf_counter()
        first = first or end
        num_tokens += len(event.delta.token_ids)
    if not event.HasField("finish"):
        raise WrongAnswer("the answer has no finish")
    return StreamTime(sent, first, end, num_tokens, event.finish.timings.ttft_ms, event.finish.timings.e2e_ms)


class _NoWire:
    """The part of a gRPC context that a decode node asks."""

    def time_remaining(self) -> float:
        return TIMEOUT_S


@asynccontextmanager
async def over_grpc(address: str) -> AsyncIterator[Way]:
    """The gateway's own protocol."""
    async with grpc.aio.insecure_channel(address, options=channel_options(address)) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)

        async def ask(asked: Asked) -> StreamTime:
            request = gateway_pb2.GenerateRequest(
                parts=[gateway_pb2.PromptPart(text=asked.prompt)],
                mode=REUSE_MODE_EXACT,
                sampling=asked.sampling,
            )
            sent = time.perf_counter()
            return await _timed(sent, stub.Generate(request, timeout=TIMEOUT_S))

        yield ask


@asynccontextmanager
async def over_http(address: str) -> AsyncIterator[Way]:
    """Chat completions over connections that stay open. Nothing is parsed as it comes: a client's time is its own."""
    host, port = address.rsplit(":", 1)
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(asked: Asked) -> StreamTime:
        reader, writer = idle.pop() if idle else await asyncio.open_connection(host, int(port))
        request = _http_request(asked)
        sent = time.perf_counter()
        async with asyncio.timeout(TIMEOUT_S):
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in head.split(b"\r\n", 1)[0]:
                raise WrongAnswer(head.decode("latin-1") + (await reader.read(2000)).decode("latin-1"))
            body = await reader.read(1 << 16)
            first = time.perf_counter()
            while not body.endswith(b"0\r\n\r\n"):
                body += await reader.read(1 << 16)
        end = time.perf_counter()
        idle.append((reader, writer))
        told = re.findall(rb'"usage":({.*})}\n', body)
        if not told:
            raise WrongAnswer("the stream does not end with usage")
        usage = json.loads(told[-1])
        node = usage["spolia"]["timings_ms"]
        return StreamTime(sent, first, end, usage["completion_tokens"], node["ttft"], node["e2e"])

    try:
        yield ask
    finally:
        for _, writer in idle:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


def _http_request(asked: Asked) -> bytes:
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": asked.question}],
            "max_tokens": asked.num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "seed": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
