"""Health tells the truth, at once to those who ask and soon to those who watch."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from captured_logs import captured_logs
from grpc_health.v1.health_pb2 import HealthCheckResponse
from node_worlds import DIRECTORY_SERVICE, STORE_SERVICE, serving

from spolia_node.health import Health

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
NAMES = ("", STORE_SERVICE, DIRECTORY_SERVICE)


async def test_a_started_node_serves_overall_and_by_name():
    async with serving() as world:
        assert [await world.health_of(name) for name in NAMES] == [SERVING] * 3


async def test_an_unknown_service_is_not_found():
    async with serving() as world:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await world.health_of("spolia.v1.Nothing")
    assert failed.value.code() is grpc.StatusCode.NOT_FOUND


async def test_every_service_follows_the_watched_check():
    async with serving() as world:
        progress = True
        world.server.health.watch(lambda: progress)
        assert [await world.health_of(name) for name in NAMES] == [SERVING] * 3
        progress = False
        assert [await world.health_of(name) for name in NAMES] == [NOT_SERVING] * 3
        progress = True
        assert [await world.health_of(name) for name in NAMES] == [SERVING] * 3


async def test_a_check_that_raises_is_not_serving():
    def broken() -> bool:
        raise RuntimeError("the step loop is gone")

    async with serving() as world:
        world.server.health.watch(broken)
        assert await world.health_of() == NOT_SERVING


async def test_a_node_that_becomes_ready_does_so_quietly_and_warns_when_it_is_no_longer() -> None:
    ready, health = False, Health()
    health.watch(lambda: ready)
    with captured_logs() as logs:
        health.start()
        for ready in (False, True, False, True):  # noqa: B007  # the check reads it
            health.refresh()
        await health.stop()
    told = [(entry["log_level"], entry["serving"]) for entry in logs if entry["event"] == "health changed"]
    assert told == [("info", False), ("info", True), ("warning", False), ("warning", True)]


async def test_a_node_that_is_not_ready_for_long_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spolia_node.health.START_S", 0.0)
    health = Health()
    health.watch(lambda: False)
    with captured_logs() as logs:
        health.start()
        health.refresh()
        await health.stop()
    assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == ["not ready since the start"]


async def test_one_service_down_takes_the_overall_with_it_and_no_other():
    async with serving() as world:
        world.server.health.set(STORE_SERVICE, False)
        assert [await world.health_of(name) for name in NAMES] == [NOT_SERVING, NOT_SERVING, SERVING]


async def test_a_service_set_serving_does_not_outvote_the_check():
    async with serving() as world:
        world.server.health.watch(lambda: False)
        world.server.health.set(STORE_SERVICE, True)
        assert await world.health_of(STORE_SERVICE) == NOT_SERVING


async def test_watchers_are_told_of_each_change_and_of_the_drain_and_then_let_go():
    async with serving() as world:
        progress = True
        world.server.health.watch(lambda: progress)
        watch = world.watch_health(STORE_SERVICE)
        assert (await watch.read()).status == SERVING
        progress = False  # nobody asks: the poll finds it
        assert (await watch.read()).status == NOT_SERVING
        progress = True
        assert (await watch.read()).status == SERVING
        told = asyncio.Event()
        world.server.on_drain.append(told.wait)  # the drain has begun and goes on
        drain = asyncio.ensure_future(world.server.drain())
        assert (await watch.read()).status == NOT_SERVING
        told.set()
        await asyncio.wait_for(drain, 30)
        assert world.server.num_running == 0


async def test_watching_an_unknown_service_says_so_until_it_is_known():
    async with serving() as world:
        watch = world.watch_health("later")
        assert (await watch.read()).status == HealthCheckResponse.SERVICE_UNKNOWN
        world.server.health.set("later", True)
        assert (await watch.read()).status == SERVING


def test_a_drain_is_for_good():
    health = Health()
    health.set("a", True)
    assert health.is_serving() is True
    health.drain()
    health.set("a", True)
    assert health.is_serving() is False
    assert health.is_serving("a") is False
    assert health.is_serving("b") is None
