"""What is lost, damaged, leaked or stuck while stores and Redis are killed at random.

Two stores share a Redis that keeps nothing on disk. Clients put, get, pin and claim, and remember what was
acknowledged, while one process after another gets SIGKILL and is started again. When all is quiet, everything
acknowledged with durability DISK must be there, bit for bit, unless the store's own log says that it was evicted.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from spolia.v1.kvstore_pb2 import DURABILITY_DISK, DURABILITY_RAM, Durability
from spolia_bench.frame import Report, progress
from spolia_bench.redis_server import RedisServer
from spolia_bench.store.aftermath import Aftermath, settle
from spolia_bench.store.objects import FINGERPRINT, chunk_id_of, make_object
from spolia_bench.store.processes import StoreProcess
from spolia_core.digests import digest
from spolia_core.errors import AlreadyStored, Busy, DeadlineExceeded, SpoliaError, Unavailable
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline
from spolia_node.store_address import StoreAddress
from spolia_node.store_client import StoreClient

QUESTION = "What is lost, damaged, leaked or stuck while stores and Redis are killed at random?"
TENANT = "chaos"
RAM_BUDGET_BYTES = 64 << 20
DISK_BUDGET_BYTES = 1 << 30
OBJECT_BYTES = (20_000, 200_000, 1_500_000)
CALL_TIMEOUT_S = 10.0
STUCK_AFTER_S = 5.0
"""How long after its deadline a call counts as stuck."""

MAX_LEASE_MS = 3000
EXPECTED = (AlreadyStored, Busy, DeadlineExceeded, Unavailable)


@dataclass(slots=True)
class Outcome:
    """What happened; `is_clean` says what must be 0. An eviction by policy is no loss."""

    acked: dict[int, bytes] = field(default_factory=dict)
    """Objects acknowledged with durability DISK: number → digest."""
    acked_ram: dict[int, bytes] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    corrupt: int = 0
    stuck: int = 0
    longest_call_s: float = 0.0
    seconds: float = 0.0
    num_clients: int = 0
    max_memory_over_budget_bytes: int = 0
    aftermath: Aftermath = field(default_factory=Aftermath)

    @property
    def is_clean(self) -> bool:
        """Nothing lost, damaged, leaked or stuck, and nothing failed in a way that no caller is told to expect."""
        after = self.aftermath
        leaked = after.leaked_pins + after.leaked_claims + after.leaked_transfers
        wrong = after.lost + self.corrupt + leaked + self.stuck + len(self.unexpected)
        return bool(self.acked) and not wrong + after.not_located + after.lost_rows + after.orphan_files

    def report(self, seed: int) -> Report:
        """As a table and a JSON line."""
        after = self.aftermath
        setup = {
            "seed": seed,
            "seconds": round(self.seconds, 1),
            "clients": self.num_clients,
            "stores": 2,
            "ram_budget_bytes": RAM_BUDGET_BYTES,
            "disk_budget_bytes": DISK_BUDGET_BYTES,
            "object_bytes": OBJECT_BYTES,
        }
        report = Report("store-chaos", QUESTION, setup, header=("what", "count"))
        report.figures = {
            "acked": len(self.acked),
            "evicted_by_policy": after.evicted,
            "lost": after.lost,
            "corrupt": self.corrupt,
            "leaked_pins": after.leaked_pins,
            "stuck": self.stuck,
            "leaked_claims": after.leaked_claims,
            "leaked_transfers": after.leaked_transfers,
            "not_located": after.not_located,
            "orphan_files": after.orphan_files,
            "lost_rows": after.lost_rows,
            "quarantined": after.quarantined,
            "acked_ram": len(self.acked_ram),
            "kills": dict(self.kills),
            "calls": dict(self.calls),
            "errors": dict(self.errors),
            "unexpected": self.unexpected[:10],
            "longest_call_s": round(self.longest_call_s, 2),
            "max_memory_over_budget_bytes": self.max_memory_over_budget_bytes,
        }
        report.rows = [(name, str(value)) for name, value in report.figures.items()]
        return report


async def run(folder: Path, seconds: float, num_clients: int, seed: int) -> Outcome:
    """The whole of it."""
    settings = ["--budget-bytes", str(RAM_BUDGET_BYTES), "--disk-budget-bytes", str(DISK_BUDGET_BYTES)]
    with RedisServer(folder / "redis") as redis:
        settings += ["--redis-url", redis.url, "--log-level", "debug"]
        stores = [StoreProcess(f"kvstore-{i}", folder, settings) for i in range(2)]
        channels = ChannelPool(32 << 20)
        try:
            for store in stores:
                store.start()
            client = StoreClient(channels, lambda: [StoreAddress(store.name, store.address) for store in stores])
            outcome = Outcome(num_clients=num_clients)
            await _storm(outcome, client, stores, redis, seconds, num_clients, seed)
            truth = {chunk_id_of(number): expected for number, expected in outcome.acked.items()}
            outcome.aftermath, corrupt = await settle(client, channels, stores, TENANT, truth)
            outcome.corrupt += corrupt
            return outcome
        finally:
            await channels.close()
            for store in stores:
                store.stop()


async def _storm(
    outcome: Outcome,
    client: StoreClient,
    stores: Sequence[StoreProcess],
    redis: RedisServer,
    seconds: float,
    num_clients: int,
    seed: int,
) -> None:
    started = time.monotonic()
    until = started + seconds
    clients = [_Client(outcome, client, number, seed) for number in range(num_clients)]
    tasks = [asyncio.create_task(each.work(until)) for each in clients]
    watcher = asyncio.create_task(_watch_memory(outcome, stores))
    await _kill_at_random(outcome, stores, redis, until, random.Random(seed))
    limit = CALL_TIMEOUT_S + 2 * STUCK_AFTER_S
    _, pending = await asyncio.wait(tasks, timeout=limit)
    outcome.stuck += len(pending)
    for task in [*pending, watcher]:
        task.cancel()
    results = await asyncio.gather(*tasks, watcher, return_exceptions=True)
    outcome.unexpected += [repr(r) for r in results if isinstance(r, Exception)]
    outcome.seconds = time.monotonic() - started


async def _kill_at_random(
    outcome: Outcome, stores: Sequence[StoreProcess], redis: RedisServer, until: float, source: random.Random
) -> None:
    while (left := until - time.monotonic()) > 3.0:
        await asyncio.sleep(min(left, source.uniform(0.2, 2.0)))
        targets: list[StoreProcess | RedisServer] = [*stores, redis]
        target = source.choice(targets)
        name = target.name if isinstance(target, StoreProcess) else "redis"
        outcome.kills[name] += 1
        await asyncio.to_thread(target.kill)
        await asyncio.sleep(source.uniform(0.0, 1.0))
        await asyncio.to_thread(target.start)
        progress(
            f"{until - time.monotonic():5.1f} s left: {name} was killed; {len(outcome.acked)} objects acknowledged"
        )


async def _watch_memory(outcome: Outcome, stores: Sequence[StoreProcess]) -> None:
    """Anonymous and shared memory of the stores against their budget."""
    while True:
        for store in stores:
            over = store.memory_bytes() - RAM_BUDGET_BYTES
            outcome.max_memory_over_budget_bytes = max(outcome.max_memory_over_budget_bytes, over)
        await asyncio.sleep(0.2)


class _Client:
    """One reader and writer."""

    def __init__(self, outcome: Outcome, client: StoreClient, number: int, seed: int) -> None:
        self._outcome = outcome
        self._client = client
        self._owner = f"client-{number}"
        self._source = random.Random(f"{seed}-{number}")
        self._next_number = (seed * 1000 + number) * 1_000_000

    async def work(self, until: float) -> None:
        """One call after another until `until`."""
        while time.monotonic() < until:
            kind = self._source.choices(["put_disk", "put_ram", "get", "pin", "claim"], [35, 10, 40, 10, 5])[0]
            work = {
                "put_disk": self._put_disk,
                "put_ram": self._put_ram,
                "get": self._get,
                "pin": self._pin,
                "claim": self._claim,
            }[kind]
            await self._watched(kind, work())
            await asyncio.sleep(self._source.uniform(0.0, 0.2))

    async def _watched(self, kind: str, work: Coroutine[None, None, None]) -> None:
        started = time.monotonic()
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S + STUCK_AFTER_S):
                await work
            self._outcome.calls[kind] += 1
        except EXPECTED as error:
            self._outcome.errors[type(error).__name__] += 1
            if isinstance(error, Unavailable):
                await asyncio.sleep(0.1)
        except TimeoutError:
            self._outcome.stuck += 1
        except SpoliaError as error:
            self._outcome.unexpected.append(f"{kind}: {error!r}")
        self._outcome.longest_call_s = max(self._outcome.longest_call_s, time.monotonic() - started)

    async def _put_disk(self) -> None:
        number, expected = await self._put(DURABILITY_DISK)
        self._outcome.acked[number] = expected

    async def _put_ram(self) -> None:
        number, expected = await self._put(DURABILITY_RAM)
        self._outcome.acked_ram[number] = expected

    async def _put(self, durability: Durability.ValueType) -> tuple[int, bytes]:
        """Number and digest of an object that is stored as asked: a repeated Put is told so by ALREADY_EXISTS."""
        self._next_number += 1
        info, data = make_object(self._next_number, self._source.choice(OBJECT_BYTES))
        with suppress(AlreadyStored):
            await self._client.put(TENANT, info, data, self._deadline(), durability=durability)
        return self._next_number, digest(data)

    async def _get(self) -> None:
        known = self._outcome.acked | self._outcome.acked_ram if self._source.random() < 0.2 else self._outcome.acked
        if not known:
            return
        numbers = self._source.sample(list(known), min(len(known), self._source.randint(1, 4)))
        ids = [chunk_id_of(number) for number in numbers]
        async with aclosing(self._client.get(TENANT, ids, FINGERPRINT, ["raw"], self._deadline())) as chunks:
            async for chunk in chunks:
                if chunk.data is not None and digest(chunk.data) != known[numbers[chunk.index]]:
                    self._outcome.corrupt += 1
                self._outcome.calls[
                    "got"
                    if chunk.data is not None
                    else f"missed {chunk.miss.name.lower() if chunk.miss else 'nothing'}"
                ] += 1

    async def _pin(self) -> None:
        """Half of the time it is forgotten, as by a client that dies: the lease must end it."""
        if not self._outcome.acked:
            return
        ids = [chunk_id_of(self._source.choice(list(self._outcome.acked)))]
        lease_ms = self._source.randint(100, MAX_LEASE_MS)
        await self._client.pin(TENANT, ids, self._owner, self._deadline(), lease_ms=lease_ms)
        if self._source.random() < 0.5:
            await asyncio.sleep(self._source.uniform(0.0, 0.3))
            await self._client.unpin(TENANT, ids, self._owner, self._deadline())

    async def _claim(self) -> None:
        ids = [chunk_id_of(-self._source.randint(1, 50))]
        await self._client.claim(TENANT, ids, self._owner, self._deadline(), ttl_ms=MAX_LEASE_MS, wait_ms=200)

    def _deadline(self) -> Deadline:
        return Deadline.after(CALL_TIMEOUT_S)
