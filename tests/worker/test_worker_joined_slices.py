"""Jobs that leave their slices to the engine's thread: those of a turn go through the model together."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from tiny_cluster import eventually, held_engine

from spolia_core.errors import InternalError
from spolia_engine.steps import Pause, Ran, Slice, Steps
from spolia_node.metrics import Metrics
from spolia_worker.engine_job import EngineJob
from spolia_worker.engine_metrics import EngineMetrics
from spolia_worker.engine_thread import EngineThread
from spolia_worker.timed import timed_steps


def rows(count: int) -> Slice:
    return Slice([0] * count, list(range(count)), cast(Any, None))


class Model:
    """Says which slices came together; hidden states are their numbers of rows."""

    def __init__(self) -> None:
        self.passes: list[list[int]] = []

    def __call__(self, slices: Sequence[Slice]) -> list[Ran | BaseException]:
        counts = [each.num_rows for each in slices]
        self.passes.append(counts)
        return [ValueError("13 rows") if count == 13 else Ran(torch.tensor(count), 0.1 * count) for count in counts]


def job(*counts: int, held: list[int] | None = None) -> Steps[list[int]]:
    """A slice of each count, with a pause between two; returns what came of each."""
    came: list[int] = []
    held = [] if held is None else held
    held.append(1)
    try:
        for index, count in enumerate(counts):
            ran = yield Pause(slice=rows(count))
            assert ran is not None
            came.append(int(ran.hidden))
            if index + 1 < len(counts):
                yield Pause(count)
        return came
    finally:
        held.pop()


async def test_slices_of_a_turn_run_together_and_each_gets_its_own() -> None:
    model, metrics = Model(), Metrics()
    thread = EngineThread("test-engine", turn_tokens=lambda: 100, run_slices=model, metrics=EngineMetrics(metrics))
    thread.start()
    with held_engine(thread):
        jobs = [thread.submit_steps(job(n), EngineJob("tenant", n)) for n in (30, 31, 32, 33, 60, 200)]
    assert await asyncio.gather(*jobs) == [[30], [31], [32], [33], [60], [200]]
    assert model.passes == [[30, 31, 32], [33, 60], [200]]
    assert metrics.value("spolia_engine_joint_passes_total") == 3
    assert metrics.value("spolia_engine_slices_total", kind="context") == 6
    assert metrics.value("spolia_engine_tokens_total", tenant="tenant") == 386
    await thread.stop()


async def test_a_background_step_waits_for_no_more_than_a_turn() -> None:
    model, trace = Model(), list[str]()
    thread = EngineThread(
        "test-engine", lambda: bool(trace.append(str(model.passes))) or True, turn_tokens=lambda: 50, run_slices=model
    )
    thread.start()
    with held_engine(thread):
        thread.notify()
        jobs = [thread.submit_steps(job(*[20] * 3), EngineJob("tenant", 60)) for _ in range(4)]
    await asyncio.gather(*jobs)
    await thread.stop()
    assert all(sum(each) <= 50 for each in model.passes)
    assert sum(map(sum, model.passes)) == 4 * 60
    assert len(set(trace)) >= len(model.passes), "a step went between any two passes"


async def test_what_a_slice_raises_reaches_its_job_alone() -> None:
    model, held = Model(), list[int]()
    thread = EngineThread("test-engine", run_slices=model)
    thread.start()
    with held_engine(thread):
        jobs = [thread.submit_steps(job(n, held=held), EngineJob("tenant", n)) for n in (12, 13, 14)]
    first, second, third = await asyncio.gather(*jobs, return_exceptions=True)
    assert (first, third) == ([12], [14])
    assert isinstance(second, ValueError)
    assert model.passes == [[12, 13, 14]]
    assert not held
    await thread.stop()


async def test_a_job_whose_caller_goes_while_its_slice_runs_gives_back_what_it_holds() -> None:
    running, go_on, held, dropped = threading.Event(), threading.Event(), list[int](), list[Any]()

    def model(slices: Sequence[Slice]) -> list[Ran | BaseException]:
        running.set()
        go_on.wait(10)
        return [Ran(torch.tensor(each.num_rows), 0.1) for each in slices]

    thread = EngineThread("test-engine", run_slices=model)
    thread.start()
    with held_engine(thread):
        gone = thread.submit_steps(job(10, 10, held=held), EngineJob("tenant", 20), discard=dropped.append)
        ends = thread.submit_steps(job(11, held=held), EngineJob("tenant", 11), discard=dropped.append)
        stays = thread.submit_steps(job(12), EngineJob("tenant", 12))
    await eventually(running.is_set)
    gone.cancel()
    ends.cancel()
    await asyncio.sleep(0)  # the thread is told in the loop's next round
    go_on.set()
    assert await stays == [12]
    await eventually(lambda: not held)
    assert dropped == [[11]], "one was whole by then, the other had more to compute"
    await thread.stop()


async def test_tenants_take_turns_within_a_pass() -> None:
    """A slice counts for its tenant when it is chosen, not when it has run."""
    model = Model()
    thread = EngineThread("test-engine", turn_tokens=lambda: 40, run_slices=model)
    thread.start()
    with held_engine(thread):
        jobs = [thread.submit_steps(job(20), EngineJob("many", 20)) for _ in range(3)]
        jobs += [thread.submit_steps(job(15), EngineJob("few", 15)) for _ in range(2)]
    await asyncio.gather(*jobs)
    assert model.passes == [[15, 20], [15, 20], [20]]
    await thread.stop()


async def test_a_tenant_whose_only_job_stands_at_its_slice_keeps_its_turn() -> None:
    """Standing is no leaving: else who comes back from each slice would start where the others are, and wait."""
    model = Model()
    thread = EngineThread("test-engine", turn_tokens=lambda: 205, run_slices=model)
    thread.start()
    with held_engine(thread):
        jobs = [thread.submit_steps(job(*[10] * 8), EngineJob("small", 80))]
        jobs += [thread.submit_steps(job(*[200] * 3), EngineJob("large", 600))]
    await asyncio.gather(*jobs)
    assert model.passes == [[10], [200], *[[10]] * 7, [200], [200]], "small ones until both were served alike"
    await thread.stop()


async def test_a_thread_that_runs_no_slices_says_so() -> None:
    thread, held = EngineThread("test-engine"), list[int]()
    thread.start()
    with pytest.raises(InternalError, match="no slices"):
        await thread.run_steps(job(5, held=held), EngineJob("tenant", 5))
    assert not held
    await thread.stop()


async def test_a_shared_pass_counts_by_its_share() -> None:
    thread = EngineThread("test-engine", run_slices=Model())
    thread.start()
    timed = await thread.run_steps(timed_steps(job(10, 20)), EngineJob("tenant", 30))
    assert timed.seconds == pytest.approx(3.0, abs=0.05)
    await thread.stop()


async def test_a_job_may_want_slice_after_slice_without_a_pause_between() -> None:
    def in_a_row() -> Steps[list[int]]:
        came = []
        for count in (10, 20, 30):
            ran = yield Pause(slice=rows(count))
            assert ran is not None
            came.append(int(ran.hidden))
        return came

    model, metrics = Model(), Metrics()
    thread = EngineThread("test-engine", run_slices=model, metrics=EngineMetrics(metrics))
    thread.start()
    assert await thread.run_steps(in_a_row(), EngineJob("tenant", 60)) == [10, 20, 30]
    assert model.passes == [[10], [20], [30]]
    assert metrics.value("spolia_engine_tokens_total", tenant="tenant") == 60
    await thread.stop()


async def test_slices_that_came_to_nothing_are_not_held_against_their_tenant() -> None:
    """13 rows always fail: after many of them their tenant still goes first."""
    model = Model()
    thread = EngineThread("test-engine", turn_tokens=lambda: 20, run_slices=model)
    thread.start()
    for _ in range(5):
        with pytest.raises(ValueError, match="13 rows"):
            await thread.run_steps(job(13), EngineJob("unlucky", 13))
    with held_engine(thread):
        jobs = [thread.submit_steps(job(20, 20), EngineJob("other", 40))]
        jobs += [thread.submit_steps(job(19, 19, 19), EngineJob("unlucky", 57))]
    await asyncio.gather(*jobs)
    assert [counts[0] for counts in model.passes[5:]] == [20, 19, 19, 20, 19]
    await thread.stop()


async def test_steps_that_are_wrapped_may_handle_what_came_of_their_slice() -> None:
    def forgiving() -> Steps[str]:
        try:
            yield Pause(slice=rows(13))
        except ValueError:
            return "forgiven"
        return "never"

    thread = EngineThread("test-engine", run_slices=Model())
    thread.start()
    timed = await thread.run_steps(timed_steps(forgiving()), EngineJob("tenant", 13))
    assert timed.result == "forgiven"
    await thread.stop()
