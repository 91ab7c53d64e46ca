"""The whole store against a dict under random operations and crashes, with each backend.

A crash is a copy of the data folder, taken between two steps of an operation: what a killed process leaves behind is
what it had written by then. The machine goes on with a new store on the copy.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from kvstore_worlds import TENANT, Chunk, make_chunk
from redis_server import RedisServer

from spolia.v1.kvstore_pb2 import PutHeader
from spolia_core.digests import frames
from spolia_core.errors import AlreadyStored, Busy
from spolia_kvstore import opening
from spolia_kvstore.config import KVStoreConfig
from spolia_kvstore.disk_files import DiskFiles
from spolia_kvstore.entry import Reader
from spolia_kvstore.objects import ObjectKey, ObjectRecord, Tier
from spolia_kvstore.store import ClaimState, KVStore
from spolia_kvstore.wire import record_of

pytestmark = pytest.mark.slow

CHUNKS = [make_chunk(number, num_tokens=512 * (1 + number % 2), head_dim=8) for number in range(8)]
SIZE = len(CHUNKS[0].data)
NUMBERS = st.integers(0, len(CHUNKS) - 1)
OWNERS = st.sampled_from(["node-a/1", "node-b/1"])
STEPS = ["before the file", "before the row", "before the answer"]
NAME = "store"


def key_of(number: int) -> ObjectKey:
    return ObjectKey(TENANT, CHUNKS[number].chunk_id)


def announced(chunk: Chunk) -> ObjectRecord:
    return record_of(PutHeader(tenant_id=TENANT, info=chunk.info))


class StoreMachine(RuleBasedStateMachine):
    """`held` is what must be there, `maybe` what may be; neither: it must be gone."""

    redis_url = ""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.root = Path(tempfile.mkdtemp(prefix="store-machine-"))
        self.num_lives = 0
        self.held: dict[int, bool] = {}  # number → it must outlive the process
        self.maybe: set[int] = set()
        self.pinned: dict[tuple[int, str], float] = {}
        self.claimed: dict[int, tuple[str, float]] = {}
        self.now = time.time() + 3600.0  # ahead of Redis, with whose clock it is compared
        self.deleting = False
        self.store = self.opened(self.root / "0")

    # The life of a store

    def opened(self, folder: Path) -> KVStore:
        config = KVStoreConfig(
            node_id=NAME,
            data_dir=folder,
            budget_bytes=4 * SIZE,
            disk_budget_bytes=8 * SIZE,
            redis_url=self.redis_url,
            redis_prefix=f"machine-{self.root.name}",
            log_level="error",
        )
        store = self.run(self._open(config))
        removed = store.tiers.listeners.removed

        def on_removed(record: ObjectRecord, tier: Tier, is_gone: bool) -> None:
            removed(record, tier, is_gone)
            number = [chunk.chunk_id for chunk in CHUNKS].index(record.key.chunk_id)
            if is_gone:
                assert self.deleting or not self.pins_on(number), "a pinned object was evicted"
                self.held.pop(number, None)
                self.maybe.discard(number)

        store.tiers.listeners.removed = on_removed
        return store

    async def _open(self, config: KVStoreConfig) -> KVStore:
        """The store's clocks are the machine's."""
        stores = {NAME: "localhost:1"}
        store = opening.open_store(config, lambda: stores, clock=self.tick, wall_clock=self.tick)
        await store.backend.start()
        if store.backend.is_shared:
            async with asyncio.timeout(20):
                while not store.backend.reachable:  # noqa: ASYNC110 - there is an event, but the store has it
                    await asyncio.sleep(0.005)
        return store

    def tick(self) -> float:
        """Time passes with what is done, so that a run can be repeated: what is evicted depends on it."""
        self.now += 0.01
        return self.now

    def run(self, work):  # type: ignore[no-untyped-def]  # whatever `work` answers
        return self.runner.run(work)

    def crash(self, copy: Path) -> None:
        """Goes on with what was on disk when `copy` was taken."""
        old = self.store
        # What the dead process can no longer do: hold its lock and its connections.
        old.catalog.close()
        self.run(old.backend.close())
        self.num_lives += 1
        for number in [n for n, is_durable in self.held.items() if not is_durable]:
            del self.held[number]
            self.maybe.add(number)
        self.store = self.opened(copy)
        self.forget_what_is_gone()

    def forget_what_is_gone(self) -> None:
        """What may have gone with the process: objects that were in memory only, and pins on them."""
        here = {number for number in range(len(CHUNKS)) if self.store.tiers.find([key_of(number)])}
        self.maybe &= here
        self.pinned = {pin: until for pin, until in self.pinned.items() if pin[0] in here}

    def copied(self) -> Path:
        target = self.root / str(self.num_lives + 1)
        shutil.rmtree(target, ignore_errors=True)
        assert self.store.tiers.disk is not None
        shutil.copytree(self.store.tiers.disk.files.root, target)
        return target

    def pins_on(self, number: int) -> bool:
        return any(pin[0] == number and until > self.store._clock() for pin, until in self.pinned.items())

    # Operations

    @initialize()
    def begin(self) -> None:
        assert self.store.num_objects == 0

    def put(self, number: int, *, durable: bool) -> bool:
        async def work() -> None:
            chunk = CHUNKS[number]
            upload = await self.store.puts.begin(announced(chunk), "", durable=durable)
            try:
                for offset, piece, piece_digest in frames(chunk.data, 4096):
                    self.store.puts.append_frame(upload, offset, piece, piece_digest)
                await self.store.puts.finish(upload, durable=durable)
            finally:
                self.store.puts.abort(upload)

        was_here = number in self.held
        try:
            self.run(work())
        except AlreadyStored:
            assert was_here or number in self.maybe
        except Busy:
            return False  # everything is pinned
        self.held[number] = durable or self.held.get(number, False)
        self.maybe.discard(number)
        self.claimed.pop(number, None)
        return True

    @rule(number=NUMBERS, durable=st.booleans())
    def put_one(self, number: int, durable: bool) -> None:
        self.put(number, durable=durable)

    @rule(number=NUMBERS)
    def put_half(self, number: int) -> None:
        """A client that dies in the middle of its upload."""

        async def work() -> None:
            chunk = CHUNKS[number]
            upload = await self.store.puts.begin(announced(chunk), "")
            offset, piece, piece_digest = next(frames(chunk.data, 4096))
            self.store.puts.append_frame(upload, offset, piece, piece_digest)
            self.store.puts.abort(upload)

        with suppress(AlreadyStored, Busy):
            self.run(work())

    @rule(numbers=st.lists(NUMBERS, min_size=1, max_size=4))
    def get(self, numbers: list[int]) -> None:
        async def work() -> list[bytes | None]:
            results: list[bytes | None] = []
            async with self.store.reading([key_of(number) for number in numbers], Reader(ignore_cost=True)) as readings:
                for reading in readings:
                    entry = await self.store.begin(reading)
                    if entry.record is None:
                        results.append(None)
                        continue
                    results.append(b"".join([b"".join(frame.pieces) async for frame in reading.frames()]))
            return results

        expected = [number in self.held for number in numbers]
        possible = [number in self.held or number in self.maybe for number in numbers]
        for number, data, must, may in zip(numbers, self.run(work()), expected, possible, strict=True):
            assert data in (None, CHUNKS[number].data), "other bytes than were put"
            assert data is not None or not must, f"object {number} is lost"
            assert data is None or may, f"object {number} should be gone"

    @rule(number=NUMBERS)
    def delete(self, number: int) -> None:
        self.deleting = True
        dropped = self.run(self.store.delete([key_of(number)]))
        self.deleting = False
        assert number not in self.held
        assert number not in self.maybe
        assert dropped.objects.num_objects in (0, 1)
        self.pinned = {pin: until for pin, until in self.pinned.items() if pin[0] != number}

    @rule(number=NUMBERS, owner=OWNERS)
    def pin(self, number: int, owner: str) -> None:
        (is_pinned,) = self.store.pin([key_of(number)], owner, 3600.0)
        assert is_pinned == (number in self.held or number in self.maybe)
        if is_pinned:
            self.pinned[number, owner] = self.store._clock() + 3600.0

    @rule(number=NUMBERS, owner=OWNERS)
    def unpin(self, number: int, owner: str) -> None:
        num_ended = self.store.unpin([key_of(number)], owner)
        assert num_ended == ((number, owner) in self.pinned)
        self.pinned.pop((number, owner), None)

    @rule(number=NUMBERS, owner=OWNERS)
    def claim(self, number: int, owner: str) -> None:
        (result,) = self.run(self.store.claim([key_of(number)], owner, 3600.0, 0.0))
        if number in self.held or number in self.maybe:
            assert result.state is ClaimState.STORED
            return
        holder = self.claimed.setdefault(number, (owner, 0.0))[0]
        assert (result.state, result.owner) == (ClaimState.GRANTED if holder == owner else ClaimState.HELD, holder)

    @rule(number=NUMBERS, owner=OWNERS)
    def unclaim(self, number: int, owner: str) -> None:
        num_ended = self.run(self.store.unclaim([key_of(number)], owner))
        assert num_ended == (self.claimed.get(number, ("",))[0] == owner)
        if num_ended:
            del self.claimed[number]

    # Crashes

    @rule()
    def crash_at_rest(self) -> None:
        self.crash(self.copied())

    @rule(number=NUMBERS, step=st.sampled_from(STEPS))
    def crash_in_a_durable_put(self, number: int, step: str) -> None:
        """The put is not acknowledged: its object may be there or not, whole or not at all."""
        copies: list[Path] = []
        before = dict(self.held), set(self.maybe), dict(self.pinned)
        write = DiskFiles.write

        def watched(files: DiskFiles, name: object, pieces: Iterator[memoryview]) -> None:
            if step == STEPS[0]:
                copies.append(self.copied())
            write(files, name, pieces)  # type: ignore[arg-type]  # as the function that it stands for
            if step == STEPS[1]:
                copies.append(self.copied())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DiskFiles, "write", watched)
            is_acked = self.put(number, durable=True)
        after = set(self.held)
        if not copies or not is_acked:
            copies = [self.copied()]
            self.crash(copies[0])
            return
        # Evictions of this very put may or may not have happened by then.
        self.held, self.maybe = before[0], before[1] | {number}
        self.pinned = before[2]
        for evicted in [n for n in self.held if n not in after]:
            del self.held[evicted]
            self.maybe.add(evicted)
        self.crash(copies[0])

    @rule()
    def restart_in_order(self) -> None:
        """A drain: what was in memory only is written, so nothing is lost that the disk has room for."""

        async def work() -> None:
            await self.store.tiers.writes.write_all()
            await self.store.close()
            await self.store.backend.close()
            self.store.catalog.close()

        assert self.store.tiers.disk is not None
        root = self.store.tiers.disk.files.root
        self.run(work())
        for number in [n for n, is_durable in self.held.items() if not is_durable]:
            del self.held[number]
            self.maybe.add(number)
        self.store = self.opened(root)
        self.forget_what_is_gone()

    @rule(number=NUMBERS, where=st.floats(0, 1, exclude_max=True))
    def damage_the_file(self, number: int, where: float) -> None:
        """A flipped bit on disk is a miss, and nothing else, from then on."""
        disk = self.store.tiers.disk
        assert disk is not None
        if key_of(number) in self.store.tiers.ram or not disk.rows.find([key_of(number)]):
            return
        path = next(found.path for found in disk.files.scan() if found.name and found.name.key == key_of(number))
        content = bytearray(path.read_bytes())
        content[int(where * len(content))] ^= 1
        path.write_bytes(content)
        self.deleting = True
        self.run(self.read_ignoring(number))
        self.deleting = False
        assert number not in self.held
        self.pinned = {pin: until for pin, until in self.pinned.items() if pin[0] != number}

    async def read_ignoring(self, number: int) -> None:
        async with self.store.reading([key_of(number)], Reader(ignore_cost=True)) as (reading,):
            if (await self.store.begin(reading)).record is not None:
                async for _ in reading.frames():
                    pass

    @invariant()
    def agrees(self) -> None:
        self.run(self._settled())
        self.store.check_invariants()
        assert self.store.tiers.num_transfers == 0
        here = {number for number in range(len(CHUNKS)) if self.store.tiers.find([key_of(number)])}
        assert set(self.held) <= here <= set(self.held) | self.maybe, (set(self.held), here, self.maybe)
        assert self.store.pins.num_live == len(self.pinned)
        assert self.store.tiers.ram.held_bytes <= self.store.tiers.ram.budget_bytes
        assert self.store.tiers.disk is not None
        assert self.store.tiers.disk.used_bytes <= self.store.tiers.disk.budget_bytes

    async def _settled(self) -> None:
        while self.store.tiers.writes.num_under_way or not self.store.index.is_idle:  # noqa: ASYNC110 - whatever it is that goes on
            await asyncio.sleep(0)

    def teardown(self) -> None:
        self.run(self.store.close())
        self.run(self.store.backend.close())
        self.store.catalog.close()
        self.runner.close()
        shutil.rmtree(self.root)


MACHINE = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_a_store_alone_equals_a_dict() -> None:
    run_state_machine_as_test(StoreMachine, settings=MACHINE)


@pytest.mark.usefixtures("patient")
def test_a_store_that_shares_redis_equals_a_dict(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis") as server:
        machine: Callable[[], StoreMachine] = type("SharedMachine", (StoreMachine,), {"redis_url": server.url})
        run_state_machine_as_test(machine, settings=MACHINE)
