"""However a job in the engine's thread ends, it gives back what it holds, once; a function too."""

from __future__ import annotations

import asyncio
import threading
from functools import partial

import pytest
from engine_jobs import JOB, Work, breaking_thread
from tiny_cluster import eventually, held_engine

from spolia_core.errors import Unavailable
from spolia_engine.steps import Pause, Steps
from spolia_worker.engine_thread import EngineThread


async def test_a_job_cancelled_before_it_began_is_skipped_at_once(thread: EngineThread) -> None:
    work, skipped, discarded = Work(), [], []
    with held_engine(thread):
        future = thread.submit_steps(work.steps(), JOB, skip=lambda: skipped.append(1), discard=discarded.append)
        future.cancel()
        await eventually(lambda: skipped == [1])  # though the thread is still busy
        assert thread.queue_length == 0
    assert await thread.run(lambda: 7) == 7
    assert (work.trace, skipped, discarded) == ([], [1], [])


@pytest.mark.parametrize("waits", [False, True])
async def test_a_job_cancelled_under_way_is_closed_at_its_next_pause(thread: EngineThread, waits: bool) -> None:
    began, gate, skipped, discarded = threading.Event(), threading.Event(), [], []
    trace: list[str] = []

    def job() -> Steps[str]:
        trace.append("holds")
        try:
            began.set()
            assert gate.wait(10)
            yield Pause(1, (lambda: False) if waits else None)
            trace.append("went on")
            return "result"
        finally:
            trace.append("gave back")

    future = thread.submit_steps(job(), JOB, skip=lambda: skipped.append(1), discard=discarded.append)
    await asyncio.to_thread(began.wait, 10)
    future.cancel()
    await asyncio.sleep(0.01)
    assert trace == ["holds"]  # it cannot be interrupted
    gate.set()
    await eventually(lambda: trace == ["holds", "gave back"])
    assert (skipped, discarded) == ([], [])


async def test_a_waiting_job_that_is_cancelled_is_closed_by_the_thread_at_once(thread: EngineThread) -> None:
    began, closed_by = threading.Event(), []

    def job() -> Steps[None]:
        began.set()
        try:
            yield Pause(ready=lambda: False)
        finally:
            closed_by.append(threading.get_ident())

    running = asyncio.ensure_future(thread.run_steps(job(), JOB))
    await asyncio.sleep(0)
    assert await asyncio.to_thread(began.wait, 10)
    engine_id = await thread.run(threading.get_ident)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await eventually(lambda: closed_by == [engine_id])


async def test_the_result_of_a_job_cancelled_in_its_last_step_is_discarded(thread: EngineThread) -> None:
    began, gate, discarded = threading.Event(), threading.Event(), []

    def job() -> Steps[str]:
        yield Pause(1)
        began.set()
        assert gate.wait(10)
        return "result"

    future = thread.submit_steps(job(), JOB, discard=discarded.append)
    await asyncio.to_thread(began.wait, 10)
    future.cancel()
    await asyncio.sleep(0)
    gate.set()
    await eventually(lambda: discarded == ["result"])


async def test_every_cancel_frees_exactly_once_whenever_it_comes(thread: EngineThread) -> None:
    """Functions and jobs, turn about."""
    begun: set[int] = set()
    held: set[int] = set()
    skipped: list[int] = []

    def function(number: int) -> int:
        begun.add(number)
        held.add(number)
        return number

    def job(number: int) -> Steps[int]:
        function(number)
        try:
            for _ in range(number // 2 % 4):
                yield Pause(1)
        except BaseException:
            held.remove(number)
            raise
        return number

    async def one(number: int) -> None:
        skip = partial(skipped.append, number)
        if number % 2:
            work = thread.run(partial(function, number), discard=held.remove, skip=skip)
        else:
            work = thread.run_steps(job(number), JOB, discard=held.remove, skip=skip)
        task = asyncio.ensure_future(work)
        for _ in range(number // 2 % 7):
            await asyncio.sleep(0)
        task.cancel()
        try:
            held.remove(await task)
        except asyncio.CancelledError:
            return

    await asyncio.gather(*(one(number) for number in range(800)))
    await eventually(lambda: not held)
    assert thread.queue_length == 0
    assert len(set(skipped)) == len(skipped)
    assert not begun.intersection(skipped)


async def test_stopping_closes_jobs_under_way_and_skips_the_rest() -> None:
    thread, skipped = EngineThread("test-engine"), []
    thread.start()
    waiting = Work(ready=lambda: False)
    futures = [thread.submit_steps(waiting.steps(), JOB, skip=lambda: skipped.append("begun"))]
    await eventually(lambda: waiting.holds)
    with held_engine(thread) as release:
        new = Work()
        futures.append(thread.submit_steps(new.steps(), JOB, skip=lambda: skipped.append("new")))
        stopping = asyncio.ensure_future(thread.stop())
        await asyncio.sleep(0)
        release()
        results = await asyncio.gather(*futures, return_exceptions=True)
        await stopping
    assert all(isinstance(result, Unavailable) for result in results)
    assert (waiting.holds, new.trace, skipped) == (False, [], ["new"])
    with pytest.raises(Unavailable):
        await thread.run_steps(Work().steps(), JOB, skip=lambda: skipped.append("late"))
    assert skipped == ["new", "late"]


async def test_a_thread_whose_invariant_broke_closes_its_jobs() -> None:
    with breaking_thread() as thread:
        work = Work(ready=lambda: False)
        future = thread.submit_steps(work.steps(), JOB)
        await eventually(lambda: work.holds)
        thread.notify()
        with pytest.raises(Unavailable):
            await future
        await eventually(lambda: thread.is_stalled(1000))
        assert not work.holds
