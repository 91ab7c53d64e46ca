"""A node as a child process of this one: started, announced, ended."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from spolia_core.errors import InvalidRequest, SpoliaError

TAIL_LINES = 20
KILL_WAIT_S = 10.0
CLIENT_SECRETS = ("SPOLIA_API_KEY", "SPOLIA_OTHER_API_KEY")
"""What the commands of a client find in the environment, and no node needs."""

REFUSED = 2
"""What a node ends with that cannot start as it was told to."""


class NodeFailed(SpoliaError):
    """A local node ended, or was not ready in time, while it was needed. Its log says why; the message has its tail."""


class NodeRefused(NodeFailed, InvalidRequest):
    """A local node would not start as it was told to: a wrong setting, a model that is none, a port that is taken."""


@dataclass(frozen=True, slots=True)
class LocalNode:
    """A node that announced itself. `log_path` is None where its log goes to the terminal, `http_address` empty for a
    node that serves no HTTP, `metrics_address` for one that serves no metrics.
    """

    name: str
    role: str
    pid: int
    address: str
    log_path: Path | None
    http_address: str = ""
    metrics_address: str = ""


@dataclass(frozen=True, slots=True)
class NodeExit:
    """A node that ended without being asked to. A negative `exit_code` is the number of the signal that ended it."""

    node: LocalNode
    exit_code: int
    log_tail: str

    def __str__(self) -> str:
        return f"{self.node.name} (pid {self.node.pid}) {ended_how(self.exit_code)}"


class NodeProcess:
    """One child process. It says `READY <role> <host:port>` on standard output once it serves, and logs elsewhere; a
    node adds `http=<host:port>` and `metrics=<host:port>` for what it serves there.

    In a session of its own, so that a Ctrl-C at the terminal reaches the parent alone, which ends nodes in order. Its
    standard input stays open for as long as the parent lives. `changed`, which several may share, is notified when the
    process is ready and when it has ended; after the end `on_exit` is called, on a thread of this object.
    """

    def __init__(
        self,
        name: str,
        role: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        log_path: Path | None,
        changed: threading.Condition,
        on_exit: Callable[[NodeProcess], None],
    ) -> None:
        self.name = name
        self.role = role
        self.log_path = log_path
        self._address = ""
        self._planes: dict[str, str] = {}
        self._exit_code: int | None = None
        self._changed = changed
        self._on_exit = on_exit
        self._process = self._spawn(command, env)
        for work in (self._read_output, self._await_end):
            threading.Thread(target=work, name=f"{name}-{work.__name__}", daemon=True).start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._exit_code is None

    @property
    def ready(self) -> bool:
        """Whether it has announced itself, even if it has ended since."""
        return bool(self._address)

    @property
    def node(self) -> LocalNode:
        """What it is; the address is empty before it is ready."""
        http, metrics = (self._planes.get(plane, "") for plane in ("http", "metrics"))
        return LocalNode(self.name, self.role, self.pid, self._address, self.log_path, http, metrics)

    @property
    def exit(self) -> NodeExit:
        """How it ended. Call after it has."""
        if self._exit_code is None:
            raise AssertionError(f"{self.name} is running")
        return NodeExit(self.node, self._exit_code, self.log_tail())

    def wait_ended(self, deadline_s: float) -> bool:
        """Waits for its end until `deadline_s` (monotonic clock); whether it has ended."""
        with self._changed:
            return self._changed.wait_for(lambda: not self.running, max(0.0, deadline_s - time.monotonic()))

    def terminate(self) -> None:
        """Asks it to end in order."""
        self._process.terminate()

    def kill(self) -> None:
        """Ends it as a crash would, and waits until the system has taken it away."""
        self._process.kill()
        self.wait_ended(time.monotonic() + KILL_WAIT_S)

    def failure(self, what: str) -> NodeFailed:
        """The error that says `what` became of it, with the end of its log."""
        tail = self.log_tail()
        failed = NodeRefused if self._exit_code == REFUSED and not self.ready else NodeFailed
        return failed(f"{self.name} {what}" + (f"; its log ends so:\n{tail}" if tail else ""))

    def log_tail(self) -> str:
        """The last lines of its log, none of an earlier process; empty where that goes to the terminal, or is gone."""
        if self.log_path is None:
            return ""
        try:
            with self.log_path.open("rb") as log:
                log.seek(self._log_begin)
                return b"".join(deque(log, maxlen=TAIL_LINES)).decode(errors="replace").rstrip()
        except OSError:
            return ""

    def _spawn(self, command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[str]:
        log = None if self.log_path is None else _opened(self.log_path)
        self._log_begin = 0 if log is None else log.tell()
        try:
            return subprocess.Popen(
                command,
                env={**{name: value for name, value in os.environ.items() if name not in CLIENT_SECRETS}, **env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        finally:
            if log is not None:
                log.close()

    def _read_output(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                match line.split():
                    case ["READY", self.role, address, *also] if not self._address:
                        planes = dict(word.split("=", 1) for word in also if "=" in word)
                        with self._changed:
                            self._address, self._planes = address, planes
                            self._changed.notify_all()
                    case _:
                        self._log(line)

    def _log(self, line: str) -> None:
        # Without a place for its lines, the node's output is still read: a full pipe would stop the node.
        with suppress(OSError, ValueError):
            if self.log_path is None:
                sys.stderr.write(line)
                return
            with self.log_path.open("a") as log:
                log.write(line)

    def _await_end(self) -> None:
        exit_code = self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        with self._changed:
            self._exit_code = exit_code
            self._changed.notify_all()
        self._on_exit(self)


def cannot_log(path: Path, error: OSError) -> InvalidRequest:
    """The error for logs that cannot be kept at `path`."""
    return InvalidRequest(f"cannot keep logs in {path}: {error.strerror}", field="log_dir", actual=str(path))


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("ab")
    except OSError as error:
        raise cannot_log(path.parent, error) from error


def ended_how(exit_code: int) -> str:
    """In words."""
    if exit_code < 0:
        return f"was ended by signal {-exit_code}"
    return f"ended with exit code {exit_code}"
