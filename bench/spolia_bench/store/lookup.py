"""How long finding 32 ids takes, and how that grows with the index.

Ceiling: a B-tree of 1 M rows is one level deeper than one of 1 k, and a hash as deep; so the time is nearly that of
turning 32 rows into records, at any size.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from spolia_bench.frame import Report, progress
from spolia_bench.redis_server import RedisServer, redis_binary
from spolia_core.reuse import ChunkKind
from spolia_kvstore.backend import Backend, Replica
from spolia_kvstore.catalog import Catalog
from spolia_kvstore.embedded_backend import EmbeddedBackend
from spolia_kvstore.objects import ObjectKey, ObjectRecord, Tier
from spolia_kvstore.redis_backend import RedisBackend

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
    async with _backends(kind, folder, sizes) as backends:
        for size, backend in backends.items():
            started = time.monotonic()
            await _fill(backend, size, seed)
            if isinstance(backend, EmbeddedBackend):
                backend.catalog.checkpoint()  # as a store does every few seconds
            progress(f"{kind}: {size} entries in {time.monotonic() - started:.1f} s")
        for run in range(runs + 1):
            for size, backend in backends.items():
                percentiles = await _one_run(backend, size, seed, run)
                if run:  # the first warms up
                    results[size].append(percentiles)
    for size in sizes:
        for name in ("p50", "p99"):
            values = [getattr(each, f"{name}_us") for each in results[size]]
            _add(report, f"lookup_{name}_us_{kind}_{_in_words(size)}", values)
    smallest, largest = min(sizes), max(sizes)
    ratio = _median(results[largest]) / _median(results[smallest])
    report.figures[f"lookup_p99_{kind}_ratio_{_in_words(largest)}_over_{_in_words(smallest)}"] = round(ratio, 2)


@asynccontextmanager
async def _backends(kind: str, folder: Path, sizes: Sequence[int]) -> AsyncIterator[dict[int, Backend]]:
    """One backend for each size; all Redis ones in one server, under prefixes of their own."""
    if kind == "sqlite":
        catalogs = {size: Catalog(str(folder / f"index-{size}.db")) for size in sizes}
        yield {size: EmbeddedBackend(catalog) for size, catalog in catalogs.items()}
        for catalog in catalogs.values():
            catalog.close()
        return
    with RedisServer(folder / "redis") as server:
        backends = {size: RedisBackend(server.url, f"bench-{size}", timeout_s=5.0) for size in sizes}
        for backend in backends.values():
            connected = asyncio.Event()
            backend.on_reconnected(connected.set)
            await backend.start()
            async with asyncio.timeout(30):
                await connected.wait()
        yield dict(backends)
        for backend in backends.values():
            await backend.close()


async def _fill(backend: Backend, size: int, seed: int) -> None:
    batch: list[Replica] = []
    for chunk_id in _ids(size, seed):
        batch.append(Replica(_record(chunk_id), Tier.DISK, STORE))
        if len(batch) == BATCH:
            await backend.publish(batch)
            batch = []
    if batch:
        await backend.publish(batch)


async def _one_run(backend: Backend, size: int, seed: int, run: int) -> Percentiles:
    """Ids are drawn anew for each lookup, so that no cache has them all."""
    chosen = random.Random(f"{seed}-{size}-{run}")
    known = list(_ids(size, seed))
    times = []
    for _ in range(LOOKUPS_PER_RUN):
        ids = chosen.sample(known, NUM_IDS)
        started = time.perf_counter()
        found = await backend.locate(TENANT, ids, [STORE])
        times.append((time.perf_counter() - started) * 1e6)
        if len(found) != NUM_IDS:
            raise RuntimeError(f"{len(found)} of {NUM_IDS} ids found in an index of {size}")
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


def _median(percentiles: Sequence[Percentiles]) -> float:
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
