"""The engine's thread: order, errors, and who frees what when callers go."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import grpc
import pytest
from engine_jobs import breaking_thread
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from tiny_cluster import World, eventually, held_engine

from spolia_core.errors import InternalError, InvalidRequest, Unavailable
from spolia_worker.engine_thread import EngineThread


def fail(error: BaseException) -> None:
    raise error


async def test_tasks_run_one_after_another_in_order(thread: EngineThread) -> None:
    running, order = 0, []

    def task(number: int) -> int:
        nonlocal running
        running += 1
        assert running == 1
        order.append(number)
        running -= 1
        return number

    assert await asyncio.gather(*(thread.run(lambda n=n: task(n)) for n in range(50))) == list(range(50))
    assert order == list(range(50))


async def test_what_a_task_raises_reaches_its_caller_and_the_thread_goes_on(thread: EngineThread) -> None:
    with pytest.raises(InvalidRequest, match="bad"):
        await thread.run(lambda: fail(InvalidRequest("bad")))
    with pytest.raises(SystemExit):
        await thread.run(lambda: fail(SystemExit(3)))
    with pytest.raises(InternalError, match="StopIteration"):
        await thread.run(lambda: fail(StopIteration()))
    assert await thread.run(lambda: 7) == 7


async def test_a_task_cancelled_before_it_began_is_skipped_at_once(thread: EngineThread) -> None:
    ran, skipped, discarded = [], [], []
    with held_engine(thread):
        waiting = asyncio.ensure_future(
            thread.run(lambda: ran.append(1), skip=lambda: skipped.append(1), discard=discarded.append)
        )
        await eventually(lambda: thread.queue_length == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await eventually(lambda: skipped == [1])  # though the thread is still busy
        assert thread.queue_length == 0
    assert await thread.run(lambda: 7) == 7
    assert (ran, skipped, discarded) == ([], [1], [])


async def test_the_result_of_a_task_cancelled_under_way_is_discarded(thread: EngineThread) -> None:
    began, gate, skipped, discarded = threading.Event(), threading.Event(), [], []

    def work() -> str:
        began.set()
        gate.wait(10)
        return "result"

    running = asyncio.ensure_future(thread.run(work, skip=lambda: skipped.append(1), discard=discarded.append))
    await asyncio.to_thread(began.wait, 10)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    gate.set()
    await eventually(lambda: discarded == ["result"])
    assert skipped == []


async def test_a_result_that_arrives_as_its_caller_is_cancelled_is_discarded(thread: EngineThread) -> None:
    discarded: list[str] = []
    running = asyncio.ensure_future(thread.run(lambda: "result", discard=discarded.append))
    await asyncio.sleep(0)  # it is queued
    # The loop is kept from running until the thread has posted the result: then cancel and delivery race.
    done = threading.Event()
    thread.submit(done.set)
    done.wait(10)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert discarded == ["result"]


async def test_a_delivered_result_is_discarded_when_its_caller_never_resumed(thread: EngineThread) -> None:
    discarded: list[str] = []
    running = asyncio.ensure_future(thread.run(lambda: "result", discard=discarded.append))
    await asyncio.sleep(0)
    done = threading.Event()
    thread.submit(done.set)
    done.wait(10)
    # This callback runs right behind the delivery, and before the caller is resumed.
    asyncio.get_running_loop().call_soon(running.cancel)
    with pytest.raises(asyncio.CancelledError):
        await running
    assert discarded == ["result"]


async def test_stopping_skips_and_fails_what_is_queued_and_later_work() -> None:
    thread, skipped = EngineThread("test-engine"), []
    thread.start()
    with held_engine(thread) as release:
        queued = [asyncio.ensure_future(thread.run(lambda: 1, skip=lambda: skipped.append(1))) for _ in range(3)]
        await eventually(lambda: thread.queue_length == 3)
        stopping = asyncio.ensure_future(thread.stop())
        await asyncio.sleep(0)
        release()
        results = await asyncio.gather(*queued, return_exceptions=True)
        await stopping
    assert all(isinstance(result, Unavailable) for result in results)
    with pytest.raises(Unavailable):
        await thread.run(lambda: 1, skip=lambda: skipped.append(1))
    assert len(skipped) == 4
    assert thread.is_stalled(1000)


async def test_a_thread_that_an_invariant_ended_fails_its_queue_and_says_so() -> None:
    with breaking_thread() as thread:
        with held_engine(thread):
            thread.notify()
            waiting = asyncio.ensure_future(thread.run(lambda: 1))
            await eventually(lambda: thread.queue_length == 1)
        with pytest.raises(Unavailable):
            await waiting
        await eventually(lambda: thread.is_stalled(1000))


async def test_background_steps_and_tasks_alternate() -> None:
    trace: list[str] = []
    steps_left = 5

    def step() -> bool:
        nonlocal steps_left
        steps_left -= 1
        trace.append("step")
        return steps_left > 0

    thread = EngineThread("test-engine", step)
    thread.start()
    with held_engine(thread):
        thread.notify()
        tasks = [asyncio.ensure_future(thread.run(lambda: trace.append("task"))) for _ in range(5)]
        await eventually(lambda: thread.queue_length == 5)
    await asyncio.gather(*tasks)
    await eventually(lambda: steps_left == 0)
    assert trace == ["step", "task"] * 5
    thread.notify()  # idle, then told of new work
    await eventually(lambda: trace[-1] == "step")
    await thread.stop()


async def health_of(address: str) -> HealthCheckResponse.ServingStatus:
    async with grpc.aio.insecure_channel(address) as channel:
        return (await HealthStub(channel).Check(HealthCheckRequest(), timeout=10)).status


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_stalled_engine_makes_its_node_not_serving_until_it_moves_on(world: World, role: str) -> None:
    start: Callable[..., object] = getattr(world, role)
    node = await start(stall_limit_s=0.2)
    assert await health_of(node.server.address) == HealthCheckResponse.SERVING
    with held_engine(node.thread):
        await eventually(lambda: node.thread.is_stalled(0.2))
        assert await health_of(node.server.address) == HealthCheckResponse.NOT_SERVING
    await node.thread.run(lambda: None)
    await eventually(lambda: not node.thread.is_stalled(0.2))
    assert await health_of(node.server.address) == HealthCheckResponse.SERVING
