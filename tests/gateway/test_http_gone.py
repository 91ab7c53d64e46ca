"""Clients that leave, and many that stay: nothing is held for those that are gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from gateway_fakes import WAIT_S, FakeDecode, delta, finish, hangs
from http_worlds import HttpWorld, http_world, says

NUM_STREAMS = 100


async def ends(decode: FakeDecode, met: HttpWorld) -> None:
    """Returns once neither the node nor the gateway has work; soon, or the test fails."""
    async with asyncio.timeout(WAIT_S):
        while decode.num_running or met.world.node.gateway.num_running:
            decode.ended.clear()
            if decode.num_running:
                await decode.ended.wait()
            await asyncio.sleep(0.005)


async def sent(met: HttpWorld, body: dict[str, Any]) -> asyncio.StreamWriter:
    """A connection over which a request went out."""
    host, port = met.world.node.http_address.split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    await writer.drain()
    return writer


@pytest.mark.parametrize("streams", [False, True])
async def test_a_client_that_goes_before_any_token_ends_its_work(streams: bool, model: Path) -> None:
    async def silent(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield

    decode = FakeDecode("d0", silent)
    async with http_world(model, [decode]) as met:
        for prompt in ("x", ["x", "y"]):
            writer = await sent(met, {"prompt": prompt, "stream": streams})
            await asyncio.wait_for(decode.started.wait(), WAIT_S)
            writer.close()
            await ends(decode, met)
            decode.started.clear()
        assert 'status="499"' in await met.metric('spolia_http_requests_total{route="/v1/completions"')


async def test_a_stream_closed_by_the_official_client_ends_its_work(model: Path) -> None:
    decode = FakeDecode("d0", hangs)
    async with http_world(model, [decode]) as met:
        stream = await met.openai.completions.create(model="tiny", prompt="x", stream=True)
        async for _ in stream:
            break
        assert decode.num_running == 1
        await stream.close()
        await ends(decode, met)


async def test_a_cancelled_task_of_the_official_client_ends_its_work(model: Path) -> None:
    decode = FakeDecode("d0", hangs)
    async with http_world(model, [decode]) as met:
        asking = asyncio.ensure_future(met.openai.completions.create(model="tiny", prompt="x"))
        await asyncio.wait_for(decode.started.wait(), WAIT_S)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await ends(decode, met)


async def test_a_client_that_stops_reading_is_not_fed_without_end(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spolia_gateway.http.event_stream.STALLED_READER_S", 0.3)

    async def floods(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        text = "x" * 65536
        for index in range(100_000):
            yield delta(index, (70,), text, index * len(text))

    decode = FakeDecode("d0", floods)
    async with http_world(model, [decode]) as met:
        writer = await sent(met, {"prompt": "x", "stream": True, "max_tokens": 200})
        await asyncio.wait_for(decode.started.wait(), WAIT_S)
        await ends(decode, met)
        writer.close()


async def test_a_hundred_streams_at_once_each_get_their_own_answer(model: Path) -> None:
    async def echoes(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        word = f"{request.sampling.seed}"
        for index in range(10):
            yield delta(index, (70,), word, index * len(word))
            await asyncio.sleep(0)
        yield finish(node.node_id, 10, request.sampling.seed)

    decode = FakeDecode("d0", echoes)
    async with http_world(model, [decode]) as met:

        async def one(number: int) -> str:
            stream = await met.openai.completions.create(model="tiny", prompt="x", seed=number, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        texts = await asyncio.gather(*(one(number) for number in range(1000, 1000 + NUM_STREAMS)))
        assert texts == [f"{number}" * 10 for number in range(1000, 1000 + NUM_STREAMS)]
        await ends(decode, met)


async def test_a_connection_serves_one_request_after_another(model: Path) -> None:
    async with http_world(model, [FakeDecode("d0", says)]) as met:
        for _ in range(3):
            assert (await met.http.post("/v1/completions", json={"prompt": "x"})).status_code == 200
        assert len(met.world.node._http._uvicorn.server_state.connections) == 1  # type: ignore[union-attr]  # HTTP is on
