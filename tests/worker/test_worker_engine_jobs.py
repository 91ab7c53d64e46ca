"""Jobs in the engine's thread: they pause, wait, take turns, and give back what they hold however they end."""

from __future__ import annotations

import asyncio
import threading

import pytest
from engine_jobs import JOB, Work
from tiny_cluster import eventually

from spolia_core.errors import InvalidRequest
from spolia_engine.steps import Pause, Steps
from spolia_worker.engine_thread import EngineThread


async def test_a_job_runs_to_its_result(thread: EngineThread) -> None:
    work = Work()
    assert await thread.run_steps(work.steps(), JOB) == "result"
    assert work.trace == ["begin", "0", "1", "last", "end"]
    assert thread.queue_length == 0


async def test_what_a_job_raises_reaches_its_caller_and_the_thread_goes_on(thread: EngineThread) -> None:
    def failing(error: BaseException) -> Steps[None]:
        yield Pause(1)
        raise error

    for error, expected in [
        (InvalidRequest("bad"), InvalidRequest),
        (SystemExit(3), SystemExit),
        (StopIteration(), RuntimeError),
    ]:
        with pytest.raises(expected):
            await thread.run_steps(failing(error), JOB)
    assert await thread.run_steps(Work().steps(), JOB) == "result"


async def test_a_waiting_job_holds_nobody_up_and_goes_on_when_told(thread: EngineThread) -> None:
    here = threading.Event()
    waiting = Work(ready=here.is_set)
    future = thread.submit_steps(waiting.steps(), JOB)
    await eventually(lambda: waiting.trace == ["begin", "0"])
    assert await thread.run_steps(Work().steps(), JOB) == "result"
    assert await thread.run(lambda: 7) == 7
    assert not future.done()
    here.set()
    thread.look_again()
    assert await future == "result"


async def test_a_thread_with_nothing_but_waiting_jobs_sleeps(thread: EngineThread) -> None:
    work = Work(ready=lambda: False)
    future = thread.submit_steps(work.steps(), JOB)
    await eventually(lambda: work.num_asked > 0)
    await asyncio.sleep(0.05)
    num_asked = work.num_asked
    await asyncio.sleep(0.2)
    assert work.num_asked == num_asked
    assert not thread.is_stalled(0.01)  # it waits; nothing is stuck
    thread.look_again()
    await eventually(lambda: work.num_asked > num_asked)
    future.cancel()
    await eventually(lambda: not work.holds)


async def test_data_that_comes_while_the_thread_looks_is_not_missed(thread: EngineThread) -> None:
    arrived: set[int] = set()

    def arrive(number: int) -> None:
        arrived.add(number)
        thread.look_again()

    for number in range(200):

        def ready(number: int = number) -> bool:
            if number not in arrived and number % 2:
                threading.Thread(target=arrive, args=(number,)).start()  # as the thread is about to say no
            return number in arrived

        future = thread.submit_steps(Work(2, ready).steps(), JOB)
        if number % 2 == 0:
            await asyncio.sleep(0)
            arrive(number)
        assert await asyncio.wait_for(future, 10) == "result"


async def test_asking_whether_data_is_here_may_take_the_lock_of_whoever_brings_it(thread: EngineThread) -> None:
    lock, arrived = threading.Lock(), []

    def ready() -> bool:
        with lock:
            return bool(arrived)

    def bring() -> None:
        for _ in range(500):
            with lock:
                thread.look_again()
        with lock:
            arrived.append(1)
            thread.look_again()

    future = thread.submit_steps(Work(2, ready).steps(), JOB)
    await asyncio.wait_for(asyncio.to_thread(bring), 10)
    assert await asyncio.wait_for(future, 10) == "result"


async def test_a_job_whose_question_fails_fails_itself(thread: EngineThread) -> None:
    def ready() -> bool:
        raise InvalidRequest("gone")

    def job() -> Steps[None]:
        while not ready():
            yield Pause(ready=ready)

    def asks_only_the_thread() -> Steps[str]:
        yield Pause(ready=ready)
        return "went on"

    with pytest.raises(InvalidRequest, match="gone"):
        await thread.run_steps(job(), JOB)
    assert await thread.run_steps(asks_only_the_thread(), JOB) == "went on"
