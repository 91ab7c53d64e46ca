"""The kvstore as users start it: a process of its own."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from kvstore_worlds import FINGERPRINT, TENANT, make_big_chunk, make_chunk, running_node

from spolia.errors import Unavailable
from spolia.v1.directory_pb2 import NODE_ROLE_KVSTORE
from spolia_kvstore.config import KVStoreConfig
from spolia_kvstore.directory_server import SERVICE as DIRECTORY_SERVICE
from spolia_kvstore.server import SERVICE as STORE_SERVICE
from spolia_node.channels import ChannelPool
from spolia_node.config import load_config
from spolia_node.deadline import Deadline
from spolia_node.membership import ClusterView
from spolia_node.store_address import stores_at
from spolia_node.store_client import StoreClient

Process = asyncio.subprocess.Process


def soon() -> Deadline:
    return Deadline.after(30.0)


async def spawn(*arguments: str) -> Process:
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-m", "spolia_kvstore", *arguments)
    return await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)


@asynccontextmanager
async def serving(*arguments: str) -> AsyncIterator[tuple[Process, str]]:
    """A process that said READY, and its address; killed at the end unless it has ended."""
    process = await spawn("--port", "0", *arguments)
    assert process.stdout is not None
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode().split()
        assert line[:2] == ["READY", "kvstore"], line
        yield process, line[2]
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.fixture
async def channels() -> AsyncIterator[ChannelPool]:
    pool = ChannelPool(16 << 20)
    yield pool
    await pool.close()


async def test_it_says_ready_serves_and_ends_well_when_asked(channels: ChannelPool) -> None:
    chunk = make_chunk(1)
    async with serving() as (process, address):
        health = HealthStub(channels.get(address, "kvstore"))
        for service in (STORE_SERVICE, DIRECTORY_SERVICE):
            response = await health.Check(HealthCheckRequest(service=service), timeout=10)
            assert response.status == HealthCheckResponse.SERVING
        client = StoreClient(channels, lambda: stores_at(address))
        await client.put(TENANT, chunk.info, chunk.data, soon())
        assert [c.data async for c in client.get(TENANT, [chunk.chunk_id], FINGERPRINT, ["raw"], soon())] == [
            chunk.data
        ]
        view = ClusterView(channels, address, [NODE_ROLE_KVSTORE])
        view.start()
        await view.wait_for(lambda view: [r.address for r in view.nodes(NODE_ROLE_KVSTORE)] == [address], soon())
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0
        await view.stop()


async def test_a_store_killed_mid_get_is_unavailable_to_its_reader(channels: ChannelPool) -> None:
    small, big = make_chunk(1), make_big_chunk(2, mebibytes=48)
    async with serving() as (process, address):
        client = StoreClient(channels, lambda: stores_at(address))
        for chunk in (small, big):
            await client.put(TENANT, chunk.info, chunk.data, soon())
        chunks = client.get(TENANT, [small.chunk_id, big.chunk_id], FINGERPRINT, ["raw"], soon())
        assert (await anext(chunks)).data == small.data
        process.kill()
        with pytest.raises(Unavailable):
            await anext(chunks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget-bytes", "0"), "budget_bytes"),
        (("--disk-budget-bytes", "0"), "disk_budget_bytes"),
        (("--half-life-s", "0.5"), "half_life_s"),
        (("--tenant-quota-bytes", "-1"), "tenant_quota_bytes"),
        (("--node-lease-ms", "1"), "between 100 and"),
        (("--host", "0.0.0.0"), "cluster_secret"),
        (("--no-such-setting", "1"), "--no-such-setting"),
    ],
)
def test_bad_settings_stop_the_start_by_name(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(KVStoreConfig, arguments, environ={})
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


async def reason_not_to_start(*arguments: str) -> str:
    process = await spawn(*arguments)
    _, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 2, errors.decode()
    assert "Traceback" not in errors.decode()
    return errors.decode()


async def test_a_folder_or_a_port_in_use_stops_the_start_with_a_reason(tmp_path: Path) -> None:
    async with serving("--data-dir", str(tmp_path)) as (_, address):
        assert "locked" in await reason_not_to_start("--port", "0", "--data-dir", str(tmp_path))
        assert "cannot be bound" in await reason_not_to_start("--port", address.rpartition(":")[2])


async def test_a_folder_or_a_file_that_cannot_be_used_stops_the_start_by_name(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("[a]\nbites = 1\n")
    for setting in ("data-dir", "quotas-file"):
        reason = await reason_not_to_start("--port", "0", f"--{setting}", str(taken))
        assert setting.replace("-", "_") in reason
        assert str(taken) in reason


async def test_it_starts_without_torch() -> None:
    code = (
        "import sys, spolia_kvstore.__main__\n"
        "heavy = {'torch', 'transformers', 'triton', 'numpy', 'spolia_engine', 'spolia_kernels'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, out.decode().strip()) == (0, "[]")


async def test_a_drain_ends_streams_to_the_directory_and_takes_no_new_calls(channels: ChannelPool) -> None:
    async with running_node(drain_timeout_s=60.0) as node:
        address = node.server.address
        view = ClusterView(channels, address, [NODE_ROLE_KVSTORE])
        view.start()
        await view.wait_for(lambda view: view.reachable, soon())
        assert await asyncio.wait_for(node.server.drain(), 30), "watchers and heartbeats must not hold the drain up"
        with pytest.raises(Unavailable):
            await StoreClient(channels, lambda: stores_at(address)).stats(soon())
        await view.stop()
