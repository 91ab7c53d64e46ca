"""A node's process: READY when it serves, 0 after a clean drain, and gone at once when asked twice."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from node_worlds import serving

from spolia.errors import error_from_rpc
from spolia.v1.kvstore_pb2 import GetStatsRequest
from spolia.v1.kvstore_pb2_grpc import KVStoreServiceStub
from spolia_core.errors import Unavailable
from spolia_node.channels import ChannelPool

SCRIPT = Path(__file__).with_name("node_process.py")


@dataclass
class Started:
    """A node's process and the address it announced."""

    process: asyncio.subprocess.Process
    address: str

    async def line(self) -> str:
        assert self.process.stdout is not None
        return (await asyncio.wait_for(self.process.stdout.readline(), 60)).decode().strip()

    async def ended(self) -> tuple[int | None, str, str]:
        out, err = await asyncio.wait_for(self.process.communicate(), 60)
        return self.process.returncode, out.decode(), err.decode()


@asynccontextmanager
async def node(hook: str, *flags: str) -> AsyncIterator[Started]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, str(SCRIPT), hook, *flags, stdout=pipe, stderr=pipe)
    started = Started(process, "")
    try:
        ready, role, started.address, metrics = (await started.line()).split()
        assert (ready, role) == ("READY", "kvstore")
        assert metrics.startswith("metrics=127.0.0.1:")
        yield started
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def num_objects(address: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = KVStoreServiceStub(channel)
        return (await stub.GetStats(GetStatsRequest(), timeout=30)).num_objects


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_node_that_says_ready_serves_and_one_signal_ends_it_with_0(number: signal.Signals):
    async with node("well", "--log-json") as started:
        assert await num_objects(started.address) == 1
        started.process.send_signal(number)
        code, out, err = await started.ended()
    assert (code, out) == (0, "")
    lines = [json.loads(line) for line in err.splitlines()]
    assert [line["event"] for line in lines] == ["serving", "draining", "drained"]
    assert all(line["role"] == "kvstore" and line["node_id"].startswith("node-") for line in lines)


async def test_a_drain_that_was_not_clean_ends_with_1_and_says_why():
    async with node("broken") as started:
        started.process.terminate()
        code, _, err = await started.ended()
    assert code == 1
    assert "RuntimeError: the disk is full" in err


async def test_a_second_signal_stops_at_once():
    async with node("never", "--drain-timeout-s", "3600") as started:
        started.process.terminate()
        assert await started.line() == "HOOK"
        started.process.send_signal(signal.SIGINT)
        code, _, _ = await started.ended()
    assert code == 128 + signal.SIGINT


async def test_the_drain_limit_ends_a_process_whose_hook_never_ends():
    async with node("never", "--drain-timeout-s", "0.2") as started:
        started.process.terminate()
        code, _, err = await started.ended()
    assert code == 1
    assert "drain hooks were late" in err


@pytest.mark.slow
async def test_a_frozen_peer_is_noticed_within_seconds_and_an_idle_one_is_kept():
    """Frozen, a process keeps its connections and answers nothing: only keepalive can tell."""
    async with node("well") as started:
        pool = ChannelPool(16 << 20)
        stub: Any = KVStoreServiceStub(pool.get(started.address, "kvstore"))
        await stub.GetStats(GetStatsRequest(), timeout=30)
        await asyncio.sleep(6.5)  # the time itself is under test: three probes of an idle connection
        assert pool.get(started.address, "kvstore").get_state() is grpc.ChannelConnectivity.READY
        started.process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await stub.GetStats(GetStatsRequest(), timeout=60)
        finally:
            started.process.send_signal(signal.SIGCONT)
        assert type(error_from_rpc(failed.value)) is Unavailable
        await pool.close()


@pytest.mark.slow
async def test_a_frozen_callers_stream_ends_and_frees_what_it_held():
    entered, left = asyncio.Event(), asyncio.Event()

    async def hold(_context: Any) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    program = """
import sys, grpc
from spolia.v1.kvstore_pb2 import GetRequest
from spolia.v1.kvstore_pb2_grpc import KVStoreServiceStub
list(KVStoreServiceStub(grpc.insecure_channel(sys.argv[1])).Get(GetRequest()))
"""
    async with serving(hold) as world:
        caller = await asyncio.create_subprocess_exec(sys.executable, "-c", program, world.server.address)
        try:
            await asyncio.wait_for(entered.wait(), 60)
            caller.send_signal(signal.SIGSTOP)
            await asyncio.wait_for(left.wait(), 60)
        finally:
            caller.kill()
            await caller.wait()


def test_importing_the_node_loads_no_torch():
    program = """
import importlib, pkgutil, sys
import spolia_node
names = [found.name for found in pkgutil.iter_modules(spolia_node.__path__)]
for name in names:
    importlib.import_module(f"spolia_node.{name}")
heavy = {"torch", "transformers", "triton", "numpy", "spolia_engine", "spolia_kernels", "typer"} & set(sys.modules)
print(len(names), sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    num_modules, _, heavy = done.stdout.strip().partition(" ")
    assert int(num_modules) >= 10
    assert heavy == "[]"
