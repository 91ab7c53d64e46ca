"""The ledger adds up after every move, and eviction takes only what nobody reads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from spolia_core.chunk_object import KvShape
from spolia_core.errors import Busy
from spolia_core.reuse import ChunkKind
from spolia_engine.extent import BlockState, Extent
from spolia_engine.pool import Pool
from spolia_engine.resident import ResidentChunks
from spolia_engine.run import Run

SHAPE = KvShape(1, 1, 2, 2, "F32")
NUM_BLOCKS, BLOCK_SIZE = 8, 4


def small_pool() -> tuple[Pool, ResidentChunks]:
    pool = Pool(SHAPE, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    return pool, ResidentChunks(pool)


def chunk(pool: Pool, resident: ResidentChunks, chunk_id: bytes, num_tokens: int = BLOCK_SIZE) -> Extent:
    """A chunk nobody reads: cached."""
    extent = pool.allocate(num_tokens)
    resident.register(chunk_id, ChunkKind.LOCAL, Run(extent, 0, num_tokens, 0))
    pool.release(extent)
    return extent


def moves(pool: Pool) -> tuple[Any, ...]:
    counts = pool.counts()
    return tuple(counts[state] for state in BlockState)


class PoolMachine(RuleBasedStateMachine):
    """Pool and residents against a model of plain dicts and lists."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.resident = small_pool()
        self.held: list[Extent] = []  # once per reference
        self.in_transfer: list[Extent] = []
        self.chunks: dict[bytes, Extent] = {}
        self.lru: list[Extent] = []  # cached extents, least recently used first

    @rule(num_tokens=st.integers(1, NUM_BLOCKS * BLOCK_SIZE + 3), in_transfer=st.booleans())
    def allocate(self, num_tokens: int, in_transfer: bool) -> None:
        needed = -(-num_tokens // BLOCK_SIZE)
        before, resident = moves(self.pool), dict(self.chunks)
        held = {*self.held, *self.in_transfer}
        room = NUM_BLOCKS - sum(extent.num_blocks for extent in held)
        assert room == self.pool.available_blocks
        if needed > room:
            with pytest.raises(Busy) as caught:
                self.pool.allocate(num_tokens, in_transfer=in_transfer)
            assert moves(self.pool) == before
            assert all(chunk_id in self.resident for chunk_id in resident)
            assert (caught.value.retry_after_ms > 0) == (needed <= NUM_BLOCKS)
            return
        free = room - sum(extent.num_blocks for extent in self.lru)
        extent = self.pool.allocate(num_tokens, in_transfer=in_transfer)
        while free < needed:
            evicted = self.lru.pop(0)
            free += evicted.num_blocks
            self.chunks = {c: e for c, e in self.chunks.items() if e is not evicted}
        assert extent.capacity == num_tokens == extent.key.shape[2]
        (self.in_transfer if in_transfer else self.held).append(extent)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        extent = data.draw(st.sampled_from(self.held))
        self.pool.retain(extent)
        self.held.append(extent)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        extent = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(extent)
        if extent not in self.held and extent in self.chunks.values():
            self.lru.append(extent)

    @precondition(lambda self: self.in_transfer)
    @rule(data=st.data(), arrives=st.booleans())
    def end_transfer(self, data: st.DataObject, arrives: bool) -> None:
        extent = self.in_transfer.pop(data.draw(st.integers(0, len(self.in_transfer) - 1)))
        if arrives:
            self.pool.arrive(extent)
            self.held.append(extent)
        else:
            self.pool.release(extent)
            assert extent.state is BlockState.FREE

    @precondition(lambda self: self.held)
    @rule(data=st.data(), name=st.integers(0, 5))
    def register(self, data: st.DataObject, name: int) -> None:
        extent, chunk_id = data.draw(st.sampled_from(self.held)), bytes([name])
        first = self.resident.register(chunk_id, ChunkKind.LOCAL, Run(extent, 0, extent.capacity, 0))
        assert first == (chunk_id not in self.chunks)
        self.chunks.setdefault(chunk_id, extent)

    @rule(name=st.integers(0, 5))
    def acquire(self, name: int) -> None:
        run = self.resident.acquire(bytes([name]))
        expected = self.chunks.get(bytes([name]))
        assert (run.extent if run else None) is expected
        if expected is not None:
            self.held.append(expected)
            if expected in self.lru:
                self.lru.remove(expected)

    @rule(name=st.integers(0, 5))
    def drop(self, name: int) -> None:
        extent = self.chunks.pop(bytes([name]), None)
        assert self.resident.drop(bytes([name])) == (extent is not None)
        if extent in self.lru and extent not in self.chunks.values():
            assert extent is not None
            self.lru.remove(extent)
            assert extent.state is BlockState.FREE

    @invariant()
    def the_ledger_adds_up(self) -> None:
        self.pool.check_invariants()
        counts = self.pool.counts()
        assert sum(counts.values()) == NUM_BLOCKS
        assert counts[BlockState.REFERENCED] == sum(e.num_blocks for e in set(self.held))
        assert counts[BlockState.IN_TRANSFER] == sum(e.num_blocks for e in self.in_transfer)
        assert counts[BlockState.CACHED] == sum(e.num_blocks for e in self.lru)

    @invariant()
    def what_is_held_keeps_its_memory(self) -> None:
        assert all(extent.key.numel() for extent in {*self.held, *self.in_transfer, *self.lru})

    @invariant()
    def residents_are_what_was_registered(self) -> None:
        assert set(self.resident.held(ChunkKind.LOCAL)) == set(self.chunks)


PoolMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase


def test_the_least_recently_used_chunk_goes_first() -> None:
    pool, resident = small_pool()
    for name in range(NUM_BLOCKS):
        chunk(pool, resident, bytes([name]))
    for name in (0, 1):  # read again: now the youngest
        run = resident.acquire(bytes([name]))
        assert run is not None
        pool.release(run.extent)
    pool.allocate(BLOCK_SIZE * 3)
    assert [name for name in range(NUM_BLOCKS) if bytes([name]) in resident] == [0, 1, 5, 6, 7]


def test_eviction_never_takes_what_somebody_reads() -> None:
    pool, resident = small_pool()
    for name in range(NUM_BLOCKS):
        chunk(pool, resident, bytes([name]))
    run = resident.acquire(bytes([0]))
    assert run is not None
    with pytest.raises(Busy):
        pool.allocate(BLOCK_SIZE * NUM_BLOCKS)
    pool.allocate(BLOCK_SIZE * (NUM_BLOCKS - 1))
    assert resident.held(ChunkKind.LOCAL) == [bytes([0])]
    assert run.extent.key.numel()
    pool.check_invariants()


def test_a_dropped_chunk_stays_for_its_reader_and_goes_with_it() -> None:
    pool, resident = small_pool()
    chunk(pool, resident, b"a")
    run = resident.acquire(b"a")
    assert run is not None
    assert resident.drop(b"a")
    assert resident.acquire(b"a") is None
    assert run.extent.key.numel()
    pool.release(run.extent)
    assert pool.counts()[BlockState.FREE] == NUM_BLOCKS


def test_releasing_more_often_than_retaining_is_an_assertion() -> None:
    pool, _ = small_pool()
    extent = pool.allocate(1)
    pool.release(extent)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(extent)
    with pytest.raises(AssertionError, match="memory went"):
        pool.retain(extent)
    pool.check_invariants()


def test_who_spares_the_cache_leaves_it_in_its_order_and_whoever_else_uses_it_renews_what_it_read() -> None:
    pool, resident = small_pool()
    ids = [b"a", b"b", b"c", b"d"]
    for chunk_id in ids:
        chunk(pool, resident, chunk_id)

    def order() -> list[bytes]:
        pool.check_invariants()
        return [chunk_id for extent in pool._cached for chunk_id in extent.chunk_ids]

    assert order() == ids
    read, also_read = (resident.acquire(chunk_id) for chunk_id in (b"b", b"a"))
    assert read is not None
    assert also_read is not None
    assert order() == [b"c", b"d"]
    with pool.sparing_cache():
        pool.release(read.extent)
        assert order() == [b"b", b"c", b"d"]
        pool.release(also_read.extent)
    assert order() == ids
    counts = resident.acquire(b"b")
    assert counts is not None
    pool.release(counts.extent)
    assert order() == [b"a", b"c", b"d", b"b"]


def test_memory_that_is_not_ours_cannot_be_registered() -> None:
    pool, resident = small_pool()
    arriving = pool.allocate(4, in_transfer=True)
    with pytest.raises(AssertionError, match="in_transfer"):
        resident.register(b"a", ChunkKind.LOCAL, Run(arriving, 0, 4, 0))
    pool.release(arriving)
    with pytest.raises(AssertionError, match="free"):
        resident.register(b"a", ChunkKind.LOCAL, Run(arriving, 0, 4, 0))
    assert b"a" not in resident


def test_threads_may_share_a_pool() -> None:
    pool, resident = small_pool()

    def work(seed: int) -> int:
        done = 0
        for index in range(300):
            chunk_id = bytes([(seed * 7 + index * 5) % 12])
            run = resident.acquire(chunk_id)
            try:
                extent = run.extent if run else pool.allocate(BLOCK_SIZE)
            except Busy:
                continue
            assert extent.key.numel()
            if run is None:
                resident.register(chunk_id, ChunkKind.LOCAL, Run(extent, 0, BLOCK_SIZE, 0))
            if index % 9 == 0:
                resident.drop(chunk_id)
            pool.release(extent)
            done += 1
        return done

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(work, range(6)))
    pool.check_invariants()
    assert pool.available_blocks == NUM_BLOCKS


def test_an_extent_of_no_tokens_is_a_mistake() -> None:
    pool, _ = small_pool()
    with pytest.raises(ValueError, match="at least one"):
        pool.allocate(0)


def test_only_what_arrived_can_arrive() -> None:
    pool, _ = small_pool()
    extent = pool.allocate(1)
    with pytest.raises(AssertionError, match="no move"):
        pool.arrive(extent)
