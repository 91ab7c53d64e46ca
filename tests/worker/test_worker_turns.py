"""Turns of the engine's thread: what shares one, what ends it, and what is measured of it."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from engine_jobs import JOB, Work
from tiny_cluster import eventually, held_engine

from spolia_core.errors import InvalidRequest
from spolia_engine.steps import Pause, Steps
from spolia_node.metrics import Metrics
from spolia_worker.engine_job import EngineJob, WorkKind
from spolia_worker.engine_metrics import EngineMetrics
from spolia_worker.engine_thread import EngineThread


async def test_background_steps_run_between_the_steps_of_a_job() -> None:
    trace: list[str] = []
    thread = EngineThread("test-engine", lambda: bool(trace.append("decode")) or True)
    thread.start()

    def job() -> Steps[None]:
        for _ in range(4):
            trace.append("slice")
            yield Pause(10_000)

    with held_engine(thread):
        thread.notify()
        running = thread.submit_steps(job(), JOB)
    await running
    assert "slice,decode,slice,decode,slice,decode,slice" in ",".join(trace)
    await thread.stop()


async def test_functions_go_before_jobs(thread: EngineThread) -> None:
    trace: list[str] = []

    def job() -> Steps[None]:
        trace.append("job")
        yield Pause(1)

    with held_engine(thread):
        running = thread.submit_steps(job(), JOB)
        functions = [thread.submit(lambda n=n: trace.append(f"function {n}")) for n in range(3)]
        assert thread.queue_length == 4
    await asyncio.gather(running, *functions)
    assert trace == ["function 0", "function 1", "function 2", "job"]


async def test_short_jobs_share_a_turn_until_its_tokens_are_spent() -> None:
    trace: list[str] = []

    def step() -> bool:
        trace.append("decode")
        return "end" not in trace

    def job(num_tokens: int) -> Steps[None]:
        trace.append(str(num_tokens))
        yield from ()

    thread = EngineThread("test-engine", step, turn_tokens=lambda: 100)
    thread.start()
    with held_engine(thread):
        thread.notify()
        sizes = (30, 31, 32, 33, 60, 200)
        jobs = [thread.submit_steps(job(size), EngineJob("tenant", size)) for size in sizes]
    await asyncio.gather(*jobs)
    trace.append("end")
    await eventually(lambda: trace[-1] == "decode")
    turns = [turn.split() for turn in " ".join(trace[: trace.index("end")]).split("decode")]
    assert [turn for turn in turns if turn] == [["30", "31", "32"], ["33", "60"], ["200"]]
    await thread.stop()


async def test_a_decode_step_waits_for_no_more_than_a_turn() -> None:
    """Whoever has tokens to compute, and however they are cut: between two steps are those of one turn."""
    trace: list[int] = []

    def step() -> bool:
        trace.append(0)
        return True

    def job(tenant: int) -> Steps[None]:
        for number in range(20):
            num_tokens = 1 + (7 * tenant + 13 * number) % 50
            trace.append(num_tokens)
            yield Pause(num_tokens)

    thread = EngineThread("test-engine", step, turn_tokens=lambda: 50)
    thread.start()
    with held_engine(thread):
        thread.notify()
        jobs = [thread.submit_steps(job(i), EngineJob(f"tenant {i % 3}", 1000)) for i in range(9)]
    await asyncio.gather(*jobs)
    await thread.stop()
    spent = 0
    for num_tokens in trace:
        spent = spent + num_tokens if num_tokens else 0
        assert spent <= 50


async def test_work_that_waits_in_the_middle_of_a_slice_ends_its_turn() -> None:
    trace: list[str] = []
    thread = EngineThread("test-engine", lambda: bool(trace.append("decode")) or True)
    thread.start()

    def job(name: str) -> Steps[None]:
        for _ in range(3):
            trace.append(name)
            yield Pause(ready=lambda: True)

    with held_engine(thread):
        thread.notify()
        jobs = [thread.submit_steps(job(name), JOB) for name in "ab"]
    await asyncio.gather(*jobs)
    await thread.stop()
    assert not any({one, other} <= {"a", "b"} for one, other in pairwise(trace))


async def test_time_spent_waiting_is_measured_by_kind() -> None:
    metrics = Metrics()
    thread = EngineThread("test-engine", metrics=EngineMetrics(metrics))
    thread.start()
    with held_engine(thread):
        job = thread.submit_steps(Work().steps(), EngineJob("tenant", 30, WorkKind.LINK))
        await asyncio.sleep(0.05)
    await job
    await thread.stop()
    assert metrics.value("spolia_engine_queue_seconds_count", kind="link") == 1
    assert metrics.value("spolia_engine_queue_seconds_sum", kind="link") >= 0.05
    assert metrics.value("spolia_engine_queue_seconds_count", kind="function") == 1
    assert metrics.value("spolia_engine_slices_total", kind="link") == 3
    assert metrics.value("spolia_engine_tokens_total", tenant="tenant") == 30


async def test_what_broke_off_is_no_slice() -> None:
    metrics = Metrics()
    thread = EngineThread("test-engine", metrics=EngineMetrics(metrics))
    thread.start()

    def broken() -> Steps[None]:
        yield Pause(10)
        raise InvalidRequest("in the midst of a slice")

    with pytest.raises(InvalidRequest):
        await thread.run_steps(broken(), EngineJob("tenant", 30, WorkKind.LINK))
    await thread.stop()
    assert metrics.value("spolia_engine_slices_total", kind="link") == 1
    assert metrics.value("spolia_engine_tokens_total", tenant="tenant") == 10
