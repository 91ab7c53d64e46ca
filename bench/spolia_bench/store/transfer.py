"""How fast objects come and go, per tier, beside a plain file copy and redis-py on the same bytes.

Floors: gRPC alone, moving the same bytes between two processes that keep and check nothing; for disk, that and a synced
file copy, one after the other. All files were
written a moment ago, so reads from disk find them in the system's page cache, as the file copy does.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from pathlib import Path

import redis

from spolia.v1.common_pb2 import TIER_DISK, TIER_RAM, ObjectInfo
from spolia.v1.kvstore_pb2 import DURABILITY_DISK, DURABILITY_RAM, Durability
from spolia_bench.frame import Report, progress
from spolia_bench.redis_server import RedisServer, redis_binary
from spolia_bench.store import grpc_floor
from spolia_bench.store.objects import FINGERPRINT, make_object
from spolia_bench.store.processes import StoreProcess
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline
from spolia_node.store_address import StoreAddress
from spolia_node.store_client import StoreClient

SIZES = {"1mb": 1_000_000, "16mb": 16_000_000}
OBJECTS_PER_RUN = {"1mb": 16, "16mb": 4}
TENANT = "bench"
Objects = Sequence[tuple[ObjectInfo, bytes]]


async def measure(report: Report, folder: Path, runs: int, seed: int) -> None:
    """Every way once per run, by turns, on objects that were never stored before."""
    process = StoreProcess("kvstore-0", folder, ["--budget-bytes", str(1 << 30), "--log-level", "warning"])
    channels = ChannelPool(32 << 20)
    client = StoreClient(channels, lambda: [StoreAddress(process.name, process.address)])
    rates: dict[str, list[float]] = {}
    try:
        process.start()
        for run in range(runs + 1):
            for size, num_bytes in SIZES.items():
                first = seed * 1_000_000 + (run * len(SIZES) + list(SIZES).index(size)) * 1000
                objects = [make_object(first + i, num_bytes) for i in range(2 * OBJECTS_PER_RUN[size])]
                results = await _store_rates(client, process, objects)
                results |= _copy_rates(folder, objects)
                results |= _redis_rates(folder, objects)
                results |= await grpc_floor.rates(num_bytes, OBJECTS_PER_RUN[size])
                if run:  # the first warms up
                    for way, rate in results.items():
                        rates.setdefault(f"{way}_{size}_mb_per_s", []).append(rate)
            progress(f"transfer: round {run} of {runs}")
    finally:
        await channels.close()
        process.kill()
    for name, values in rates.items():
        median = statistics.median(values)
        report.figures[name] = round(median, 1)
        report.rows.append((name, "MB/s", f"{median:.0f} ({min(values):.0f} … {max(values):.0f}, n = {len(values)})"))


async def _store_rates(client: StoreClient, process: StoreProcess, objects: Objects) -> dict[str, float]:
    half = len(objects) // 2
    in_ram, on_disk = objects[:half], objects[half:]
    rates = {
        "put_ram": await _put(client, in_ram, DURABILITY_RAM),
        "put_disk": await _put(client, on_disk, DURABILITY_DISK),
        "get_ram": await _get(client, in_ram, TIER_RAM),
    }
    # A killed store has nothing in memory: what it gives now comes from its files.
    process.kill()
    process.start()
    rates["get_disk"] = await _get(client, on_disk, TIER_DISK)
    await client.delete(TENANT, [info.chunk_id for info, _ in objects], Deadline.after(60.0))
    return rates


async def _put(client: StoreClient, objects: Objects, durability: Durability.ValueType) -> float:
    started = time.perf_counter()
    for info, data in objects:
        await client.put(TENANT, info, data, Deadline.after(60.0), durability=durability)
    return _rate(objects, started)


async def _get(client: StoreClient, objects: Objects, tier: int) -> float:
    await client.stats(Deadline.after(60.0))  # connects
    started = time.perf_counter()
    for info, data in objects:
        async with aclosing(
            client.get(TENANT, [info.chunk_id], FINGERPRINT, ["raw"], Deadline.after(60.0), ignore_cost=True)
        ) as chunks:
            async for chunk in chunks:
                if chunk.data is None or len(chunk.data) != len(data) or chunk.entry.tier != tier:
                    raise RuntimeError(f"a Get took another path: {chunk.entry}")
    return _rate(objects, started)


def _copy_rates(folder: Path, objects: Objects) -> dict[str, float]:
    source, target = folder / "source", folder / "target"
    rates: dict[str, float] = {}
    for way, work in (("file_copy", shutil.copyfile), ("file_copy_synced", _copy_synced)):
        seconds = 0.0
        for _, data in objects:
            source.write_bytes(data)
            started = time.perf_counter()
            work(source, target)
            seconds += time.perf_counter() - started
            target.unlink()
        rates[way] = sum(len(data) for _, data in objects) / seconds / 1e6
    return rates


def _copy_synced(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb") as copied:
        os.fsync(copied.fileno())


def _redis_rates(folder: Path, objects: Objects) -> dict[str, float]:
    if redis_binary() is None:
        return {}
    with RedisServer(folder / "redis") as server, redis.Redis(host="127.0.0.1", port=server.port) as client:
        client.ping()
        rates = {"redis_set": _timed(objects, lambda info, data: client.set(info.chunk_id, data))}
        return rates | {"redis_get": _timed(objects, lambda info, data: client.get(info.chunk_id))}


def _timed(objects: Objects, work: Callable[[ObjectInfo, bytes], object]) -> float:
    started = time.perf_counter()
    for info, data in objects:
        work(info, data)
    return _rate(objects, started)


def _rate(objects: Objects, started: float) -> float:
    """Megabytes per second since `started`."""
    return sum(len(data) for _, data in objects) / (time.perf_counter() - started) / 1e6
