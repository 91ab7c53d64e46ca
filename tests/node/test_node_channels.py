"""Channels to peers: one per address, until it is dropped; and what becomes of calls under way."""

from __future__ import annotations

import asyncio

import pytest
from node_worlds import Gate, World, serving

from spolia_bench.free_port import free_port
from spolia_core.errors import Unavailable
from spolia_node.calls import call_errors
from spolia_node.channels import ChannelPool
from spolia_node.config import NodeConfig


async def test_the_pool_keeps_one_channel_per_address_until_it_is_dropped():
    async with serving() as world:
        pool = ChannelPool(16 << 20)
        first = pool.get(world.server.address, "kvstore")
        assert pool.get(world.server.address, "kvstore") is first
        assert await World(world.server, first).unary_unary(timeout=30) == 1
        pool.drop(world.server.address)
        second = pool.get(world.server.address, "kvstore")
        assert second is not first
        assert await World(world.server, second).unary_unary(timeout=30) == 1
        await pool.close()
        await pool.close()
        with pytest.raises(Unavailable):
            pool.get(world.server.address, "kvstore")


@pytest.mark.parametrize("end", ["drop", "close"])
async def test_dropping_or_closing_ends_running_calls_which_is_not_a_cancel_of_their_callers(end: str):
    gate = Gate()
    async with serving(gate) as world:
        pool, address = ChannelPool(16 << 20), world.server.address

        async def call() -> list[int]:
            with call_errors(address):
                return await World(world.server, pool.get(address, "kvstore")).unary_stream(timeout=30)

        running = asyncio.ensure_future(call())
        await gate.entered.wait()
        if end == "drop":
            pool.drop(address)
        else:
            await pool.close()
        with pytest.raises(Unavailable):
            await asyncio.wait_for(running, 20)
        await asyncio.wait_for(gate.left.wait(), 20)
        await pool.close()


async def test_a_node_that_comes_back_is_called_at_once_and_one_that_is_connected_is_left_alone():
    port = free_port()
    pool, address = ChannelPool(16 << 20), f"127.0.0.1:{port}"

    async def call(world: World) -> int:
        with call_errors(address):
            return await World(world.server, pool.get(address, "kvstore")).unary_unary(timeout=30)

    async with serving() as somewhere_else:
        with pytest.raises(Unavailable):  # nobody is there: the channel waits before it tries again
            await call(somewhere_else)
    async with serving(config=NodeConfig(port=port)) as world:
        with pytest.raises(Unavailable):
            await call(world)
        pool.look_again(address)
        assert await call(world) == 1
        connected = pool.get(address, "kvstore")
        pool.look_again(address)
        assert pool.get(address, "kvstore") is connected
        await pool.close()
