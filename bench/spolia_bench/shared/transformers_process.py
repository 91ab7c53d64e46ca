"""transformers in a process of its own, as a user has it: its steps are asked for one by one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from spolia_bench.shared.message_pipe import Begin, MessagePipe, Ready, TakeTurn, Took
from spolia_bench.shared.transformers_worker import HUGE_PAGES
from spolia_core.errors import InternalError

START_S = 180.0
"""Until the first step can be asked for: torch, transformers, a model and its cache."""
TURN_S = 120.0
STOP_S = 10.0
NOT_INHERITED = (HUGE_PAGES,)


class TransformersProcess:
    """A context manager: the process lives as long as the block, and ends by itself where this one dies."""

    def __init__(self, work: Begin) -> None:
        self._work = work

    def __enter__(self) -> TransformersProcess:
        """Starts it. Raises `DeadlineExceeded` where it is not ready in time, `Unavailable` where it died."""
        environ = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "spolia_bench.shared.transformers_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environ,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._pipe = MessagePipe(self._process.stdout.fileno(), self._process.stdin.fileno())
        try:
            self.begin(self._work)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def begin(self, work: Begin) -> None:
        """From now on steps are those of `work`, which must be of the same model, seed and threads as before."""
        self._pipe.send(work)
        ready = self._pipe.receive(START_S)
        if not isinstance(ready, Ready):
            raise InternalError(f"{type(ready).__name__} was not expected here")
        if ready.has_kernels:
            raise InternalError("our kernels were imported there: this is not transformers as it comes")
        self.weights = ready.weights

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def turn_ms(self, timeout_s: float = TURN_S) -> float:
        """Milliseconds of a step there, behind one that does not count: `second_ms`, measured by that process."""
        self._pipe.send(TakeTurn())
        took = self._pipe.receive(timeout_s)
        if not isinstance(took, Took):
            raise InternalError(f"{type(took).__name__} was not expected here")
        return took.ms

    def cpu_s(self) -> float:
        """Processor time of all its threads so far; 0 where the system does not tell it in nanoseconds."""
        tasks = Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def _end(self) -> None:
        """Asks it to end by closing what it reads from, and kills it where it does not."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_S)
