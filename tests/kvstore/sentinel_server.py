"""A primary, a replica and a Sentinel that watches them: real processes, on free ports."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from types import TracebackType

from redis_server import RedisServer

from spolia_bench import redis_server
from spolia_bench.free_port import free_port

NAME = "spolia"
DOWN_AFTER_MS = 2000
READY_WITHIN_S = 60.0


class WatchedRedis:
    """A context manager that starts them, and kills what is left."""

    def __init__(self, folder: Path) -> None:
        self.primary = RedisServer(folder / "primary", password="right")
        self.replica = RedisServer(folder / "replica", password="right")
        self.port = free_port()
        self._folder = folder / "sentinel"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """One of the three that it names is not there."""
        return f"redis+sentinel://:right@127.0.0.1:1,127.0.0.1:{self.port}/{NAME}/0?sentinel_password=other"

    def __enter__(self) -> WatchedRedis:
        try:
            self.primary.start()
            self.replica.start()
            assert self.replica.ask("CONFIG", "SET", "masterauth", "right").startswith("+OK")
            assert self.replica.ask("REPLICAOF", "127.0.0.1", str(self.primary.port)).startswith("+OK")
            self._start_sentinel()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.primary.kill()
        self.replica.kill()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _start_sentinel(self) -> None:
        self._folder.mkdir(parents=True)
        config = self._folder / "sentinel.conf"
        config.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {self._folder}\nrequirepass other\n"
            f"sentinel monitor {NAME} 127.0.0.1 {self.primary.port} 1\n"
            f"sentinel auth-pass {NAME} right\n"
            f"sentinel down-after-milliseconds {NAME} {DOWN_AFTER_MS}\n"
            f"sentinel failover-timeout {NAME} 2000\n"
        )
        binary = redis_server.redis_binary()
        assert binary is not None
        with (self._folder / "sentinel.log").open("ab") as output:
            self._process = subprocess.Popen([binary, str(config), "--sentinel"], stdout=output, stderr=output)
        deadline = time.monotonic() + READY_WITHIN_S
        while "state=online" not in self.primary.ask("INFO", "replication"):
            assert time.monotonic() < deadline, "the replica did not connect"
            time.sleep(0.05)
        while f"127.0.0.1:{self.replica.port}" not in (self._folder / "sentinel.log").read_text():
            assert time.monotonic() < deadline, "the Sentinel did not find the replica"
            time.sleep(0.05)
