"""Jobs in the engine's thread: they pause, wait, take turns, and give back what they hold however they end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from itertools import pairwise

import pytest
import pytest_asyncio
from tiny_cluster import eventually, held_engine

from spolia_core.errors import InvalidRequest, Unavailable
from spolia_engine.steps import Pause, Steps
from spolia_node.metrics import Metrics
from spolia_worker.engine_job import EngineJob, WorkKind
from spolia_worker.engine_metrics import EngineMetrics
from spolia_worker.engine_thread import EngineThread

JOB = EngineJob("tenant", 30)


@pytest_asyncio.fixture
async def thread() -> AsyncIterator[EngineThread]:
    made = EngineThread("test-engine")
    made.start()
    yield made
    await made.stop()


class Work:
    """Steps that note what they do, and hold something from their first step until they end."""

    def __init__(self, num_steps: int = 3, ready: Callable[[], bool] | None = None) -> None:
        self.num_steps = num_steps
        self.ready = ready
        self.trace: list[str] = []
        self.num_asked = 0

    @property
    def holds(self) -> bool:
        return "begin" in self.trace and self.trace[-1] != "end"

    def is_ready(self) -> bool:
        self.num_asked += 1
        assert self.ready is not None
        return self.ready()

    def steps(self) -> Steps[str]:
        self.trace.append("begin")
        try:
            for number in range(self.num_steps - 1):
                self.trace.append(str(number))
                yield Pause(10, self.is_ready if self.ready else None)
            self.trace.append("last")
            return "result"
        finally:
            self.trace.append("end")


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


async def test_every_cancel_of_a_job_frees_exactly_once_whenever_it_comes(thread: EngineThread) -> None:
    held: set[int] = set()
    num_skipped = 0

    def skip() -> None:
        nonlocal num_skipped
        num_skipped += 1

    def job(number: int) -> Steps[int]:
        assert number not in held
        held.add(number)
        try:
            for _ in range(number % 4):
                yield Pause(1)
        except BaseException:
            held.remove(number)
            raise
        return number

    async def one(number: int) -> None:
        task = asyncio.ensure_future(thread.run_steps(job(number), JOB, discard=held.remove, skip=skip))
        for _ in range(number % 7):
            await asyncio.sleep(0)
        task.cancel()
        try:
            held.remove(await task)
        except asyncio.CancelledError:
            return

    await asyncio.gather(*(one(number) for number in range(400)))
    await eventually(lambda: not held)
    assert thread.queue_length == 0


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
    def background() -> bool:
        raise AssertionError("broken")

    thread = EngineThread("test-engine", background)
    threading.excepthook, hook = lambda args: None, threading.excepthook
    try:
        thread.start()
        work = Work(ready=lambda: False)
        future = thread.submit_steps(work.steps(), JOB)
        await eventually(lambda: work.holds)
        thread.notify()
        with pytest.raises(Unavailable):
            await future
        await eventually(lambda: thread.is_stalled(1000))
        assert not work.holds
    finally:
        threading.excepthook = hook


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
