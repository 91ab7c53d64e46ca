"""A drain goes in order and within its limit; a stop cuts it short."""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_reflection.v1alpha import reflection_pb2
from node_worlds import Gate, World, reflection_of, serving

from spolia.errors import error_from_rpc
from spolia_core.errors import Unavailable
from spolia_node.config import NodeConfig
from spolia_node.deadline import Deadline


async def _tell(event: asyncio.Event) -> None:
    event.set()


class Journal:
    """A registration that writes down what it is asked, and what the node looked like then."""

    def __init__(self, world: World, events: list[str]) -> None:
        self.world, self.events = world, events

    async def touch(self) -> None:
        self.events.append(f"touch accepting={self.world.server.accepting} health={await self.world.health_of()}")

    async def stop(self) -> None:
        self.events.append("leave")


async def first_failure(world: World) -> Exception:
    """Calls until a call fails."""
    try:
        while True:
            await world.health_of()
    except grpc.aio.AioRpcError as refused:
        return error_from_rpc(refused)


async def test_a_drain_goes_in_order():
    gate, hooked, events = Gate(), asyncio.Event(), []
    async with serving(gate) as world:
        world.server.registration = Journal(world, events)

        async def hook() -> None:
            events.append("hook")
            hooked.set()

        world.server.on_drain.append(hook)
        stream = asyncio.ensure_future(world.unary_stream(timeout=30))
        await gate.entered.wait()
        assert world.server.accepting
        drain = asyncio.ensure_future(world.server.drain())
        await hooked.wait()
        assert events == [f"touch accepting=True health={HealthCheckResponse.NOT_SERVING}", "hook"]
        gate.opened.set()
        assert await stream == [0, 1]
        assert await drain is True
        assert events[2:] == ["leave"]


async def test_work_is_taken_until_the_others_have_heard_of_the_drain():
    async with serving(config=NodeConfig(drain_delay_s=0.3, drain_timeout_s=60.0)) as world:
        world.server.registration = Journal(world, [])
        assert not world.server.leaving
        drain = asyncio.ensure_future(world.server.drain())
        began = time.monotonic()
        while world.server.accepting:
            assert await world.unary_unary(timeout=30) == 1
        assert 0.25 < time.monotonic() - began < 15, "not as long as the whole drain may take"
        assert world.server.leaving
        with pytest.raises(Unavailable, match="draining"):
            world.server.check_accepting()
        assert await asyncio.wait_for(drain, 30) is True


async def test_the_delay_leaves_half_of_the_limit_to_calls_and_is_none_without_a_directory():
    for registers, least_s in ((True, 2.0), (False, 0.0)):
        async with serving(config=NodeConfig(drain_delay_s=60.0, drain_timeout_s=4.0)) as world:
            if registers:
                world.server.registration = Journal(world, [])
            began = time.monotonic()
            hooked = asyncio.Event()
            world.server.on_drain.append(partial(_tell, hooked))
            drain = asyncio.ensure_future(world.server.drain())
            await asyncio.wait_for(hooked.wait(), 30)
            assert least_s <= time.monotonic() - began < least_s + 1.9
            assert await asyncio.wait_for(drain, 30) is True


async def test_what_ends_beside_the_server_does_not_keep_it_from_sending_callers_elsewhere():
    async with serving(config=NodeConfig(drain_timeout_s=30.0)) as world:
        refused = asyncio.Event()
        given: list[Deadline] = []

        async def other_server(deadline: Deadline) -> None:
            given.append(deadline)
            await refused.wait()

        world.server.on_stop.append(other_server)
        drain = asyncio.ensure_future(world.server.drain())
        assert type(await first_failure(world)) is Unavailable
        assert not drain.done()
        refused.set()
        assert await asyncio.wait_for(drain, 30) is True
        assert 0 < given[0].remaining() <= 30.0


async def test_a_stop_at_once_cuts_short_what_ends_beside_the_server():
    gate = Gate()
    async with serving(gate, NodeConfig(drain_timeout_s=3600.0)) as world:
        world.server.on_stop.append(lambda _: asyncio.Event().wait())
        stream = asyncio.ensure_future(world.unary_stream(timeout=60))
        await gate.entered.wait()
        drain = asyncio.ensure_future(world.server.drain())
        await first_failure(world)
        await asyncio.wait_for(world.server.stop_at_once(), 30)
        assert gate.left.is_set()
        await asyncio.gather(stream, drain, return_exceptions=True)


async def test_a_drain_lets_a_running_stream_finish_and_takes_no_new_one():
    gate = Gate()
    async with serving(gate) as world:
        stream = asyncio.ensure_future(world.unary_stream(timeout=30))
        await gate.entered.wait()
        drain = asyncio.ensure_future(world.server.drain())
        assert type(await first_failure(world)) is Unavailable
        with pytest.raises(Unavailable, match="draining"):
            world.server.check_accepting()
        assert not drain.done()
        gate.opened.set()
        assert await stream == [0, 1]
        assert await asyncio.wait_for(drain, 30) is True


async def test_a_drain_ends_what_is_still_running_at_its_limit():
    gate = Gate()
    async with serving(gate, NodeConfig(drain_timeout_s=0.3)) as world:
        stream = asyncio.ensure_future(world.unary_stream(timeout=30))
        await gate.entered.wait()
        assert await asyncio.wait_for(world.server.drain(), 30) is True
        assert gate.left.is_set()
        assert world.server.num_running == 0
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stream
    met = error_from_rpc(failed.value)
    assert type(met) is Unavailable
    assert "shutting down" in met.message


async def test_hooks_run_at_the_same_time_and_a_late_or_broken_one_is_not_clean():
    first, second = asyncio.Event(), asyncio.Event()

    async def one() -> None:
        first.set()
        await second.wait()

    async def other() -> None:
        second.set()
        await first.wait()

    async def broken() -> None:
        raise RuntimeError("the disk is full")

    async def late() -> None:
        await asyncio.Event().wait()

    def broken_at_once() -> Any:
        raise RuntimeError("no such hook")

    async def stubborn() -> None:
        while not first.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await first.wait()

    for hooks, limit_s, clean in (
        ([one, other], 30.0, True),
        ([one, other, broken], 30.0, False),
        ([broken_at_once], 30.0, False),
        ([late], 0.3, False),
        ([stubborn], 0.3, False),
    ):
        first.clear()
        second.clear()
        async with serving(config=NodeConfig(drain_timeout_s=limit_s)) as world:
            world.server.on_drain.extend(hooks)
            assert await asyncio.wait_for(world.server.drain(), 60) is clean
            first.set()


async def test_a_directory_that_is_away_does_not_hold_up_the_drain():
    class Away:
        async def touch(self) -> None:
            raise Unavailable("no directory")

        async def stop(self) -> None:
            await asyncio.Event().wait()

    async with serving() as world:
        world.server.registration = Away()
        assert await asyncio.wait_for(world.server.drain(), 30) is True


async def test_drains_join_and_a_stop_cuts_them_short():
    gate = Gate()
    async with serving(gate, NodeConfig(drain_timeout_s=3600.0)) as world:
        stream = asyncio.ensure_future(world.unary_stream(timeout=30))
        await gate.entered.wait()
        drains = [asyncio.ensure_future(world.server.drain()) for _ in range(2)]
        await asyncio.sleep(0)
        await asyncio.wait_for(world.server.stop_at_once(), 30)
        assert gate.left.is_set()
        for ended in (stream, *drains):
            with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
                await ended


async def test_streams_without_end_do_not_hold_up_a_drain():
    async with serving(config=NodeConfig(drain_timeout_s=3600.0)) as world:
        call = reflection_of(world)(timeout=60)
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        assert (await call.read()).list_services_response.service
        assert await asyncio.wait_for(world.server.drain(), 30) is True
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call.read()
    assert type(error_from_rpc(failed.value)) is Unavailable
