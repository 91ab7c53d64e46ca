"""A prefill node ends when what it handed over by reference is acknowledged, or its lease has ended."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from prefill_streams import acknowledge, context_work, read_until, start_of, streaming
from tiny_cluster import NUM_LAYERS, World, eventually, is_idle, tokens

from spolia.errors import error_from_rpc
from spolia_core.errors import Unavailable

PROMPT = tokens(200)


async def test_a_drain_waits_for_the_last_acknowledgement(world: World) -> None:
    node = await world.prefill(drain_timeout_s=60.0)
    async with streaming(node, start_of(node, context=context_work(PROMPT))) as call:
        await read_until(call, "done")
        await acknowledge(call, range(NUM_LAYERS - 1))
        draining = asyncio.ensure_future(node.server.drain())
        await eventually(lambda: not node.server.accepting)
        done, _ = await asyncio.wait({draining}, timeout=0.3)
        assert not done, "the last layer is on its way still"
        assert not is_idle(node.engine.pool)
        await acknowledge(call, [NUM_LAYERS - 1])
        assert await call.read() is grpc.aio.EOF
        assert (await call.code()) is grpc.StatusCode.OK
    assert await asyncio.wait_for(draining, 20)
    await eventually(lambda: is_idle(node.engine.pool))


async def test_a_drain_waits_for_nobody_whose_lease_has_ended(world: World) -> None:
    node = await world.prefill(drain_timeout_s=60.0, ack_lease_s=0.4)
    async with streaming(node, start_of(node, context=context_work(PROMPT))) as call:
        await read_until(call, "done")
        draining = asyncio.ensure_future(node.server.drain())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    refused = error_from_rpc(caught.value)
    assert isinstance(refused, Unavailable)
    assert refused.field == "ack", "not the drain has cut it off"
    assert await asyncio.wait_for(draining, 20)
