"""A cluster as a user starts it, `spolia up` in a process of its own, and one more decode node beside it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spolia import Client

WAIT_S = 120.0
STOP_S = 30.0
LOOK_S = 0.02
QUESTIONS_AT_ONCE = 4
"""Short questions that are asked together, so that a node which has just come is given one of them."""


class NotServing(RuntimeError):
    """What was started did not serve in time; the message has what it said."""


@dataclass(frozen=True, slots=True)
class Up:
    """A cluster that has answered. Times are seconds since `spolia up` was run."""

    address: str
    nodes: list[dict[str, Any]]
    ready_s: float
    first_answer_s: float

    def node(self, role: str) -> dict[str, Any]:
        """The first node of a role."""
        return next(node for node in self.nodes if node["role"] == role)


@contextmanager
def cluster_up(model: Path, tables_dir: Path) -> Iterator[Up]:
    """`spolia up` until its first answer. `tables_dir`: where decode nodes keep what they measured at a start."""
    command = [sys.executable, "-m", "spolia.cli.main", "up", "--model", str(model), "--port", "0", "--http-port", "0"]
    command += ["--json", "--", "--decode.tables-dir", str(tables_dir)]
    began_s = time.monotonic()
    with _process(command) as process:
        told = json.loads(_first_line(process))
        ready_s = time.monotonic() - began_s
        with Client(told["address"], timeout_s=WAIT_S) as client:
            client.generate("Who is the captain of the ship?", max_tokens=1)
        yield Up(told["address"], told["nodes"], ready_s, time.monotonic() - began_s)


def joined_s(up: Up, model: Path, tables_dir: Path) -> float:
    """Seconds from the start of one more decode node until it has answered a request that came through the gateway."""
    name = "decode-joining"
    command = [sys.executable, "-m", "spolia_decode", "--model", str(model), "--node-id", name]
    command += ["--directory", up.node("kvstore")["address"], "--tables-dir", str(tables_dir)]
    began_s = time.monotonic()
    with (
        _process(command),
        Client(up.address, timeout_s=WAIT_S) as client,
        ThreadPoolExecutor(QUESTIONS_AT_ONCE) as pool,
    ):

        def nodes_of(number: int) -> tuple[str, ...]:
            return client.generate(f"Question {number}: who is there?", max_tokens=8).reuse.nodes

        number = 0
        while time.monotonic() - began_s < WAIT_S:
            if any(node.node_id == name for node in client.cluster().nodes):
                answered = pool.map(nodes_of, range(number, number + QUESTIONS_AT_ONCE))
                number += QUESTIONS_AT_ONCE
                if any(name in nodes for nodes in answered):
                    return time.monotonic() - began_s
            time.sleep(LOOK_S)
    raise NotServing(f"{name} answered nothing within {WAIT_S:g} s")


@contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is asked to end with the block, and killed where it does not."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    with ThreadPoolExecutor(1) as pool:
        try:
            line = pool.submit(process.stdout.readline).result(WAIT_S)
        except TimeoutError:
            process.kill()  # and the read ends
            raise NotServing(f"spolia up was not ready within {WAIT_S:g} s") from None
    if not line:
        raise NotServing("spolia up ended before it was ready; its errors are above")
    return line
