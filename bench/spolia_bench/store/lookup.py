"""How long finding 32 ids takes, and how that grows with the index.

Ceiling: a B-tree of 1 M rows is one level deeper than one of 1 k, and a hash as deep; so the time is nearly that of
turning 32 rows into records, at any size. For SQLite the path of a store's own look-up is timed, for Redis that of a
question about other stores.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

from spolia_bench.frame import Report, progress
from spolia_bench.redis_server import RedisServer, redis_binary
from spolia_core.reuse import ChunkKind
from spolia_kvstore.backend import Replica
from spolia_kvstore.catalog import Catalog
from spolia_kvstore.catalog_row import Row
from spolia_kvstore.disk_files import DiskFiles
from spolia_kvstore.disk_tier import DiskTier
from spolia_kvstore.objects import ObjectKey, ObjectRecord, Tier
from spolia_kvstore.redis_backend import RedisBackend
from spolia_kvstore.usage import Usage

NUM_IDS = 32
LOOKUPS_PER_RUN = 1000
BATCH = 1000
TENANT = "bench"
STORE = "kvstore-bench"


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of one run, in microseconds."""

    p50_us: float
    p99_us: float


def measure(report: Report, folder: Path, sizes: Sequence[int], runs: int, seed: int) -> None:
    """Fills an index of each size and looks ids up in all of them by turns."""
    folder.mkdir(parents=True)
    asyncio.run(_measure_kind(report, "sqlite", folder, sizes, runs, seed))
    if redis_binary() is None:
        progress("no redis-server is installed: the rows of Redis are left out")
        return
    asyncio.run(_measure_kind(report, "redis", folder, sizes, runs, seed))


async def _measure_kind(report: Report, kind: str, folder: Path, sizes: Sequence[int], runs: int, seed: int) -> None:
    results: dict[int, list[Percentiles]] = {size: [] for size in sizes}
    async with _indexes(kind, folder, sizes) as indexes:
        for size, index in indexes.items():
            started = time.monotonic()
            ids = _ids(size, seed)
            while batch := list(islice(ids, BATCH)):
                await index.add(batch)
            await index.settle()
            progress(f"{kind}: {size} entries in {time.monotonic() - started:.1f} s")
        for run in range(runs + 1):
            for size, index in indexes.items():
                percentiles = await _one_run(index, size, seed, run)
                if run:  # the first warms up
                    results[size].append(percentiles)
    for size in sizes:
        for name in ("p50", "p99"):
            values = [getattr(each, f"{name}_us") for each in results[size]]
            _add(report, f"lookup_{name}_us_{kind}_{_in_words(size)}", values)
    smallest, largest = min(sizes), max(sizes)
    if smallest != largest:
        ratio = _median_p99(results[largest]) / _median_p99(results[smallest])
        report.figures[f"lookup_p99_{kind}_ratio_{_in_words(largest)}_over_{_in_words(smallest)}"] = round(ratio, 2)


class _Index(Protocol):
    async def add(self, ids: Sequence[bytes]) -> None:
        """Lists objects."""

    async def settle(self) -> None:
        """Does what a store does in the background."""

    async def find(self, ids: Sequence[bytes]) -> int:
        """How many of these are listed."""


class _Sqlite:
    """What a store asks itself: rows of its disk tier."""

    def __init__(self, folder: Path) -> None:
        files = DiskFiles(folder)
        self._catalog = Catalog(str(folder / "index.db"))
        self._tier = DiskTier(files, self._catalog, 1 << 60, 900.0, may_go=lambda key: True, on_gone=lambda row: None)

    async def add(self, ids: Sequence[bytes]) -> None:
        usage, frames = Usage(time.time(), time.time()), (bytes(16),) * 2
        self._catalog.put_many(
            Row(_record(chunk_id), Tier.DISK, usage, frames, f"{number:016x}") for number, chunk_id in enumerate(ids)
        )

    async def settle(self) -> None:
        self._catalog.checkpoint()

    async def find(self, ids: Sequence[bytes]) -> int:
        return len(self._tier.rows.find([ObjectKey(TENANT, chunk_id) for chunk_id in ids]))

    async def close(self) -> None:
        await self._tier.close()
        self._catalog.close()


class _Redis:
    """What a store asks about others: replicas in the index that they share."""

    def __init__(self, url: str, prefix: str) -> None:
        self.backend = RedisBackend(url, prefix, timeout_s=5.0)

    async def add(self, ids: Sequence[bytes]) -> None:
        await self.backend.publish([Replica(_record(chunk_id), Tier.DISK, STORE) for chunk_id in ids])

    async def settle(self) -> None:
        pass

    async def find(self, ids: Sequence[bytes]) -> int:
        return len(await self.backend.locate(TENANT, ids, [STORE]))


@asynccontextmanager
async def _indexes(kind: str, folder: Path, sizes: Sequence[int]) -> AsyncIterator[dict[int, _Index]]:
    """One for each size; all Redis ones in one server, under prefixes of their own."""
    if kind == "sqlite":
        async with AsyncExitStack() as stack:
            own: dict[int, _Index] = {}
            for size in sizes:
                own[size] = index = _Sqlite(folder / str(size))
                stack.push_async_callback(index.close)
            yield own
        return
    with RedisServer(folder / "redis") as server:
        async with AsyncExitStack() as stack:
            shared: dict[int, _Index] = {}
            for size in sizes:
                shared[size] = redis = _Redis(server.url, f"bench-{size}")
                connected = asyncio.Event()
                redis.backend.on_reconnected(connected.set)
                stack.push_async_callback(redis.backend.close)
                await redis.backend.start()
                async with asyncio.timeout(30):
                    await connected.wait()
            yield shared


async def _one_run(index: _Index, size: int, seed: int, run: int) -> Percentiles:
    """Ids are drawn anew for each lookup, so that no cache has them all."""
    chosen = random.Random(f"{seed}-{size}-{run}")
    known = list(_ids(size, seed))
    times = []
    for _ in range(LOOKUPS_PER_RUN):
        ids = chosen.sample(known, NUM_IDS)
        started = time.perf_counter()
        num_found = await index.find(ids)
        times.append((time.perf_counter() - started) * 1e6)
        if num_found != NUM_IDS:
            raise RuntimeError(f"{num_found} of {NUM_IDS} ids found in an index of {size}")
    times.sort()
    return Percentiles(statistics.median(times), times[int(len(times) * 0.99)])


def _ids(size: int, seed: int) -> Iterator[bytes]:
    source = random.Random(seed)
    for _ in range(size):
        yield source.randbytes(32)


def _record(chunk_id: bytes) -> ObjectRecord:
    return ObjectRecord(
        key=ObjectKey(TENANT, chunk_id),
        kind=ChunkKind.LOCAL,
        format_version=1,
        codec="raw",
        fingerprint=bytes(32),
        num_tokens=512,
        size_bytes=1 << 20,
        digest=bytes(16),
        replica=f"{STORE}/1-1",
        compute_s=0.1,
    )


def _median_p99(percentiles: Sequence[Percentiles]) -> float:
    return statistics.median(each.p99_us for each in percentiles)


def _add(report: Report, name: str, values: Sequence[float]) -> None:
    median = statistics.median(values)
    report.figures[name] = round(median, 1)
    report.rows.append((name, "µs", f"{median:.1f} ({min(values):.1f} … {max(values):.1f}, n = {len(values)})"))


def _in_words(size: int) -> str:
    for unit, name in ((1_000_000, "m"), (1_000, "k")):
        if size % unit == 0:
            return f"{size // unit}{name}"
    return str(size)
