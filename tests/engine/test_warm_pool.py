"""A pool whose free memory stays warm: whoever takes blocks takes that too, and copies hold nobody up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from warm_worlds import BLOCK_TOKENS, SLOT_BYTES, WIDE, filled, pool_of, warm_slots

from spolia_core.errors import Busy
from spolia_core.reuse import ChunkKind
from spolia_engine.extent import BlockState, Extent, Piece
from spolia_engine.kept_memory import MIN_BYTES
from spolia_engine.pool import Pool
from spolia_engine.resident import ResidentChunks
from spolia_engine.run import Run
from spolia_engine.slab import Slot


def test_a_tail_says_how_far_it_may_have_been_written() -> None:
    pool = pool_of()
    head = filled(pool, 6, 1.0)
    tail = pool.open_tail(30, head)
    assert tail.slot is not None
    assert tail.slot.num_written == 8, "the head's last block is written without another"
    for num_tokens, num_written in ((2, 8), (3, 12), (11, 20), (30, 36)):
        pool.grow(tail, num_tokens)
        assert 6 + num_tokens <= tail.slot.num_written == num_written
    alone = pool.open_tail(5)
    assert alone.slot is not None
    assert alone.slot.num_written == 0
    for extent in (head, tail, alone):
        pool.release(extent)
    assert warm_slots(pool._slabs) == [(64, 0)]
    pool.check_invariants()


def test_memory_that_is_warm_is_free_memory_until_somebody_takes_it() -> None:
    pool = pool_of()
    bytes_of_block = BLOCK_TOKENS * WIDE.bytes_per_token
    tails = [pool.open_tail(16) for _ in range(4)]
    for tail in tails:
        pool.grow(tail, 16)
    for tail in tails:
        pool.release(tail)
    assert pool._slabs.warm_bytes == 4 * SLOT_BYTES == 16 * bytes_of_block
    assert pool.counts()[BlockState.FREE] == 64
    first = pool.allocate(48 * BLOCK_TOKENS)
    assert pool._slabs.warm_bytes == 4 * SLOT_BYTES
    second = pool.allocate(BLOCK_TOKENS)
    assert pool._slabs.warm_bytes == 3 * SLOT_BYTES, "15 blocks are free"
    pool.check_invariants()
    tail = pool.open_tail(40)
    pool.grow(tail, 15 * BLOCK_TOKENS - 20)
    assert pool._slabs.warm_bytes == SLOT_BYTES, "and 5: a tail takes from it as it grows, too"
    third = pool.allocate(5 * BLOCK_TOKENS)
    assert pool._slabs.warm_bytes == 0
    for extent in (first, second, third, tail):
        pool.release(extent)
    pool.check_invariants()


def test_what_is_warm_and_what_is_kept_for_extents_are_free_memory_together() -> None:
    num_blocks, block_bytes = 4096, BLOCK_TOKENS * WIDE.bytes_per_token
    pool = pool_of(num_blocks)

    def idle_blocks() -> int:
        pool.check_invariants()
        idle_bytes = pool._slabs.warm_bytes + pool.kept_bytes
        assert idle_bytes <= pool.counts()[BlockState.FREE] * block_bytes
        return idle_bytes // block_bytes

    tail, extent = pool.open_tail(600), pool.allocate(2 * MIN_BYTES // WIDE.bytes_per_token)
    pool.grow(tail, 600)
    for each in (tail, extent):
        pool.release(each)
    warm, kept = pool._slabs.warm_bytes // block_bytes, MIN_BYTES // block_bytes
    assert idle_blocks() == warm + 2 * kept
    some = pool.allocate((num_blocks - warm - kept) * BLOCK_TOKENS)
    assert idle_blocks() == warm + kept, "what is kept goes first: a slot is small, and soon wanted"
    more = pool.allocate((warm + kept - 1) * BLOCK_TOKENS)
    assert idle_blocks() == 0
    for each in (some, more):
        pool.release(each)
    assert pool.counts()[BlockState.FREE] == num_blocks


def test_of_a_pool_a_sixteenth_stays_warm() -> None:
    pool = pool_of(num_blocks=16 * 4 * 2, max_warm_bytes=None)
    tails = [pool.open_tail(16) for _ in range(5)]
    for tail in tails:
        pool.grow(tail, 16)
    for tail in tails:
        pool.release(tail)
    assert pool._slabs.warm_bytes == 2 * SLOT_BYTES


def test_a_head_that_cannot_be_copied_stays_where_it_is_and_its_slot_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of()
    head = filled(pool, 6, 1.0)

    class Broken(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.copy_:
                raise MemoryError("no page for it")
            return super().__torch_function__(func, types, args, kwargs)

    before = head.pieces
    with monkeypatch.context() as patched:
        patched.setattr(Slot, "value", property(lambda slot: slot.slab.value[:, slot.index].as_subclass(Broken)))
        with pytest.raises(MemoryError):
            pool.open_tail(5, head)
    assert (head.pieces, head.slot) == (before, None)
    assert pool._slabs.num_slabs == 0
    pool.check_invariants()
    tail = pool.open_tail(5)
    assert tail.slot is not None
    assert not tail.slot.key.any(), "the keys had been copied"
    for extent in (head, tail):
        pool.release(extent)
    assert pool.counts()[BlockState.FREE] == 64


def test_a_head_is_copied_while_others_use_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of()
    head = filled(pool, 6, 1.0)
    copying, used = threading.Event(), threading.Event()

    class Slow(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.copy_:
                copying.set()
                assert used.wait(20), "the pool is held while a head is copied"
            return super().__torch_function__(func, types, args, kwargs)

    others: list[Extent] = []

    def uses() -> None:
        assert copying.wait(20)
        others.extend((pool.allocate(4), pool.open_tail(5)))
        pool.check_invariants()
        used.set()

    monkeypatch.setattr(Slot, "key", property(lambda slot: slot.slab.key[:, slot.index].as_subclass(Slow)))
    thread = threading.Thread(target=uses)
    thread.start()
    tail = pool.open_tail(5, head)
    thread.join(20)
    assert used.is_set()
    assert tail.slot is head.slot
    assert others[1].slot is not None
    assert others[1].slot.index != tail.slot.index, "a slot belongs to one"
    assert bool((head.key == 1.0).all())
    for extent in (head, tail, *others):
        pool.release(extent)
    pool.check_invariants()
    assert pool.counts()[BlockState.FREE] == 64


def head_that_is_a_chunk(pool: Pool) -> tuple[ResidentChunks, Extent, Extent]:
    resident = ResidentChunks(pool)
    head = filled(pool, 6, 1.0)
    resident.register(b"chunk", ChunkKind.PREFIX, Run(head, 0, 6, 0))
    tail = pool.open_tail(5, head)
    pool.release(tail)
    return resident, head, tail


def while_it_is_copied(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Has another thread act once, when an extent is copied out of its slot, and the copy wait for it."""
    copied, threads = Pool._copied, list[threading.Thread]()

    def slowly(pool: Pool, extent: Extent) -> Piece:
        piece = copied(pool, extent)
        if not threads:
            threads.append(threading.Thread(target=act))
            threads[0].start()
            threads[0].join(20)
            assert not threads[0].is_alive(), "the pool is held while a head is copied"
        return piece

    monkeypatch.setattr(Pool, "_copied", slowly)


def test_what_stays_cached_is_copied_while_others_use_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of()
    _, head, _ = head_that_is_a_chunk(pool)
    others: list[Extent] = []
    while_it_is_copied(monkeypatch, lambda: others.extend((pool.allocate(4), pool.open_tail(5))))
    pool.release(head)
    assert head.state is BlockState.CACHED
    assert head.slot is None
    assert bool((head.key == 1.0).all())
    assert bool((head.value == -1.0).all())
    assert len(others) == 2
    for extent in others:
        pool.release(extent)
    pool.check_invariants()


def test_what_somebody_reads_meanwhile_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of()
    resident, head, _ = head_that_is_a_chunk(pool)
    place, read = head.pieces, list[Run | None]()
    while_it_is_copied(monkeypatch, lambda: read.append(resident.acquire(b"chunk")))
    pool.release(head)
    assert [run.extent for run in read if run] == [head]
    assert head.state is BlockState.REFERENCED
    assert head.pieces is place, "who reads it has looked up where it lies"
    assert head.slot is not None
    pool.release(head)
    assert (head.state, head.slot) == (BlockState.CACHED, None)
    assert bool((head.key == 1.0).all())
    pool.check_invariants()


def test_what_is_forgotten_meanwhile_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of()
    resident, head, _ = head_that_is_a_chunk(pool)
    dropped: list[bool] = []
    while_it_is_copied(monkeypatch, lambda: dropped.append(resident.drop(b"chunk")))
    pool.release(head)
    assert dropped == [True]
    assert head.state is BlockState.FREE
    assert pool._slabs.num_slabs == 0
    pool.check_invariants()
    assert pool.counts()[BlockState.FREE] == 64


def test_what_two_let_go_at_once_is_cached_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither was the last when it looked, so nobody made a copy before."""
    pool = pool_of()
    _, head, _ = head_that_is_a_chunk(pool)
    monkeypatch.setattr(Pool, "_copy_out_of_slot", lambda pool, extent: None)
    pool.release(head)
    assert (head.state, head.slot) == (BlockState.CACHED, None)
    assert bool((head.key == 1.0).all())
    pool.check_invariants()


def test_memory_that_is_lacking_for_the_copy_leaves_the_reference_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of()
    _, head, _ = head_that_is_a_chunk(pool)

    def fails(pool: Pool, extent: Extent) -> Piece:
        raise MemoryError("no page for it")

    with monkeypatch.context() as patched:
        patched.setattr(Pool, "_copied", fails)
        with pytest.raises(MemoryError):
            pool.release(head)
    assert (head.state, head.ref_count) == (BlockState.REFERENCED, 1)
    pool.check_invariants()
    pool.release(head)
    assert head.state is BlockState.CACHED


def test_threads_open_and_end_tails_at_once_and_find_their_own_numbers() -> None:
    """As the event loop opens them and the engine's thread ends them, while both read what is cached."""
    pool = pool_of(num_blocks=96, max_warm_bytes=4 * SLOT_BYTES)
    resident = ResidentChunks(pool)

    def is_all(number: float, *tensors: torch.Tensor) -> bool:
        return all(bool((tensor == number).all()) for tensor in tensors)

    def one(number: int) -> None:
        chunk_id = bytes([number % 5])
        read = resident.acquire(chunk_id)
        if read is not None:
            extent = read.extent
            assert is_all(float(extent.key[0, 0, 0, 0]), extent.key, -extent.value)
            pool.release(extent)
        head = filled(pool, 1 + number % 9, 1.0 + number)
        if number % 3:
            resident.register(chunk_id, ChunkKind.PREFIX, Run(head, 0, head.capacity, 0))
        tail = pool.open_tail(20, head)
        slot = tail.slot
        assert slot is not None
        pool.grow(tail, 7)
        tail.key[:, :, :7], tail.value[:, :, :7] = -2.0 - number, 2.0 + number
        end = head.capacity + 7
        assert is_all(1.0 + number, slot.key[:, :, : end - 7], -slot.value[:, :, : end - 7])
        assert is_all(2.0 + number, -slot.key[:, :, end - 7 : end], slot.value[:, :, end - 7 : end])
        assert is_all(0.0, slot.key[:, :, end:], slot.value[:, :, end:])
        for extent in (head, tail) if number % 2 else (tail, head):
            pool.release(extent)
        if number % 11 == 0:
            resident.drop(chunk_id)

    def work(seed: int) -> int:
        done = 0
        for index in range(120):
            try:
                one(seed * 131 + index * 5)
            except Busy:
                continue
            done += 1
        return done

    with ThreadPoolExecutor(6) as threads:
        assert sum(threads.map(work, range(6))) == 6 * 120, "there is room for all"
    pool.check_invariants()
    counts = pool.counts()
    assert counts[BlockState.FREE] + counts[BlockState.CACHED] == 96
    assert pool._slabs.num_slabs == 0
