"""Work for many processes: one that dies loses what it was at, at once, and nobody waits for one that hangs.

`multiprocessing.Pool` replaces a dead process too, but tells nobody, and may wait for ever when it is ended.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.process import BaseProcess
from typing import TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")
END_S = 10.0
"""For a process that was killed to be gone."""


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """Why an item has none."""

    why: str


@dataclass(slots=True)
class _Worker:
    process: SpawnProcess
    pipe: Connection
    item: int = -1
    """Number of what it is at."""

    def give(self, item: int, what: object) -> None:
        """The next thing to do. A process that died meanwhile is found out where its answer is read."""
        self.item = item
        with suppress(OSError):
            self.pipe.send(what)

    def end(self) -> int | None:
        """Its exit status."""
        end(self.process)
        self.pipe.close()
        return self.process.exitcode


def in_a_group_of_its_own() -> None:
    """Called by a process as it begins, so that `end` ends with it what it starts: compilers, most of all."""
    os.setpgid(0, 0)


def end(process: BaseProcess) -> None:
    """Kills a process, if it goes on, and what it started, and waits until it is gone."""
    assert process.pid is not None, "it was started"
    with suppress(ProcessLookupError, PermissionError):  # it has none yet, or is gone
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join(END_S)


def answers(
    work: Callable[[Item], Answer], items: Sequence[Item], num_processes: int, seconds: float
) -> list[Answer | NoAnswer]:
    """`work`, which a new process can import, of each item, in order; no process is left when it returns."""
    deadline = time.monotonic() + seconds
    found: list[Answer | NoAnswer] = [NoAnswer(f"not ended after {seconds:.0f} s")] * len(items)
    waiting = deque(range(len(items)))
    crew: dict[Connection, _Worker] = {}
    try:
        while waiting or crew:
            while waiting and len(crew) < num_processes:
                worker = _started(work)
                crew[worker.pipe] = worker
                worker.give(number := waiting.popleft(), items[number])
            ready = wait(list(crew), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                worker = crew[pipe]  # type: ignore[index]  # only its pipes were waited for
                try:
                    found[worker.item] = worker.pipe.recv()
                except (EOFError, OSError):
                    del crew[worker.pipe]
                    worker.process.join(END_S)
                    found[worker.item] = NoAnswer(f"its process ended by itself, status {worker.end()}")
                    continue
                if waiting:
                    worker.give(number := waiting.popleft(), items[number])
                else:
                    del crew[worker.pipe]
                    worker.end()
    finally:
        for worker in crew.values():
            worker.end()
    return found


def _started(work: Callable[[Item], Answer]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=_serve, args=(work, its), daemon=True)
    process.start()
    its.close()  # the process has one of its own: when it ends, the pipe does
    return _Worker(process, ours)


def _serve(work: Callable[[Item], Answer], pipe: Connection) -> None:
    in_a_group_of_its_own()
    while True:
        pipe.send(work(pipe.recv()))
