"""Stores as processes of this machine, which a benchmark starts, kills and starts again."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from spolia import exit_with_parent
from spolia.local_node import NodeProcess
from spolia_bench.free_port import free_port

START_TIMEOUT_S = 60.0


class StoreProcess:
    """One kvstore process on a port and a folder of its own, the same ones after each start."""

    def __init__(self, name: str, folder: Path, settings: Sequence[str] = ()) -> None:
        self.name = name
        self.address = f"127.0.0.1:{free_port()}"
        self.data_dir = folder / name
        self.log_path = folder / f"{name}.log"
        self._settings = settings
        self._changed = threading.Condition()
        self._process: NodeProcess | None = None
        self.data_dir.mkdir(parents=True, exist_ok=True)

    def memory_bytes(self) -> int:
        """Anonymous and shared memory that it holds now; 0 while it does not run."""
        if self._process is None:
            return 0
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:
            return 0
        lines = [line for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem"))]
        return sum(int(line.split()[1]) for line in lines) * 1024

    def start(self) -> None:
        """Starts it, and returns once it serves."""
        command = [sys.executable, "-P", exit_with_parent.__file__, "spolia_kvstore"]
        command += ["--port", self.address.rpartition(":")[2], "--node-id", self.name]
        command += ["--data-dir", str(self.data_dir), "--log-json", *self._settings]
        self._process = NodeProcess(
            self.name, "kvstore", command, env={}, log_path=self.log_path, changed=self._changed, on_exit=lambda _: None
        )
        process = self._process
        with self._changed:
            self._changed.wait_for(lambda: process.ready or not process.running, START_TIMEOUT_S)
        if not process.ready:
            raise process.failure("did not start")

    def kill(self) -> None:
        """SIGKILL. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def stop(self) -> None:
        """SIGTERM, and its end in order."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait_ended(time.monotonic() + START_TIMEOUT_S)
            self.kill()
