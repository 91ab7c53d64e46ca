"""Slots that stay in pages: zero, within their bound, and the ledger's as soon as it wants them."""

from __future__ import annotations

import mmap
import resource
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from engine_worlds import assert_nothing_held, engine_of, tokens
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from spolia_core.chunk_object import KvShape
from spolia_core.errors import Busy
from spolia_core.prompt import Prompt
from spolia_core.reuse import ChunkKind
from spolia_core.sampling import SamplingParams
from spolia_engine import lazy_memory
from spolia_engine import pool as pool_module
from spolia_engine import slab as slab_module
from spolia_engine.extent import BlockState, Extent, Piece
from spolia_engine.kept_memory import MIN_BYTES
from spolia_engine.pool import Pool
from spolia_engine.resident import ResidentChunks
from spolia_engine.run import Run
from spolia_engine.slab import Slab, Slabs, Slot
from spolia_kernels import torch_kernels_only

PAGE = mmap.PAGESIZE
WIDE = KvShape(2, 2, 64, 64, "F32")
"""16 tokens of a head in a page: a slot of up to so many has 8 pages."""
SLOT_BYTES = 8 * PAGE
gives_back = pytest.mark.skipif(not lazy_memory.GIVES_BACK, reason="this system gives no pages back in place")


def slabs(max_warm_bytes: int, shape: KvShape = WIDE) -> Slabs:
    world = Slabs(shape, torch.float32, torch.device("cpu"))
    world.limit_warm(max_warm_bytes)
    return world


def written(world: Slabs, num_tokens: int = 16, capacity: int = 64) -> Slot:
    slot = world.take(capacity)
    slot.num_written = num_tokens
    slot.key[:, :, :num_tokens], slot.value[:, :, :num_tokens] = 3.0, 4.0
    return slot


def warm_slots(world: Slabs) -> list[tuple[int, int]]:
    """(capacity, index) of each."""
    return sorted((slab.capacity, index) for slab in world._all() for index in slab.warm)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def num_faults(act: Callable[[], object]) -> int:
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    act()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


@gives_back
def test_who_takes_a_warm_slot_faults_no_page() -> None:
    cold, warm = slabs(0), slabs(1 << 30)
    kept = [written(world) for world in (cold, warm)]  # a slab that is in use, as under load
    first, again = [], []
    for world in (cold, warm):
        slots: list[Slot] = []
        first.append(num_faults(lambda world=world, slots=slots: slots.append(written(world, 64))))
        world.leave(slots[0])
        again.append(num_faults(lambda world=world: written(world, 64)))
    assert min(*first, again[0]) >= 32, "of a slot nobody kept, every page"
    assert again[1] < 8
    assert all(bool((slot.key[:, :, :16] == 3.0).all()) for slot in kept)


def test_a_warm_slot_is_zero_and_its_neighbours_are_not() -> None:
    world = slabs(1 << 30)
    first, slot, last = (written(world, 20) for _ in range(3))
    world.leave(slot)
    assert warm_slots(world) == [(64, 1)]
    world.check_invariants()
    again = world.take(64)
    assert again.index == slot.index
    assert not again.key.any()
    assert not again.value.any()
    assert world.warm_bytes == 0
    for kept in (first, last):
        assert bool((kept.key[:, :, :20] == 3.0).all())
        assert bool((kept.value[:, :, :20] == 4.0).all())


@pytest.mark.parametrize(("num_tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (64, 4), (99, 4)])
def test_what_is_warm_is_counted_in_pages(num_tokens: int, pages: int) -> None:
    assert Slab(WIDE, 64, torch.float32, torch.device("cpu")).page_bytes(num_tokens) == pages * SLOT_BYTES


def test_heads_that_begin_within_a_page_count_for_one_more() -> None:
    odd = KvShape(2, 2, 24, 64, "F32")  # 64 tokens of a head's keys take a page and a half
    slab = Slab(odd, 64, torch.float32, torch.device("cpu"))
    assert slab.key.stride(2) * 4 == PAGE + PAGE // 2
    assert slab.page_bytes(64) == 2 * 2 * (3 + 4) * PAGE


def test_of_what_is_left_no_more_than_the_bound_stays_and_the_lowest_does() -> None:
    world = slabs(3 * SLOT_BYTES + PAGE)
    taken = [written(world) for _ in range(8)]
    for number in (5, 0, 7, 2, 6, 1, 3):
        world.leave(taken[number])
        world.check_invariants()
    assert warm_slots(world) == [(64, 0), (64, 1), (64, 2)], "those who come next take these"
    assert world.warm_bytes == 3 * SLOT_BYTES
    world.leave(taken[4])
    assert warm_slots(world) == [(64, 0), (64, 1), (64, 2)], "and stay when none is taken"
    assert world.num_slabs == 0


def test_slots_of_a_length_nobody_asks_for_any_more_go_first() -> None:
    world = slabs(4 * SLOT_BYTES)
    short = [written(world) for _ in range(4)]
    for slot in short:
        world.leave(slot)
    assert world.warm_bytes == 4 * SLOT_BYTES
    long = [written(world, 17, 128) for _ in range(2)]
    world.leave(long[1])
    assert warm_slots(world) == [(64, 0), (64, 1), (128, 1)]
    world.leave(long[0])
    assert warm_slots(world) == [(128, 0), (128, 1)]
    assert [slab.capacity for slab in world._all()] == [128], "a slab of which nothing is left is gone"


def test_a_slot_larger_than_the_bound_goes_and_costs_no_other_its_pages() -> None:
    world = slabs(2 * SLOT_BYTES)
    for slot in [written(world), written(world, 64)]:
        world.leave(slot)
    assert warm_slots(world) == [(64, 0)]


def test_nothing_written_is_nothing_kept() -> None:
    world = slabs(1 << 30)
    slot = world.take(10)
    slot.num_written = 0
    world.leave(slot)
    assert not world._all()


@gives_back
def test_a_lower_bound_gives_pages_back_at_once() -> None:
    world = slabs(1 << 30)
    kept, *others = [written(world, 4096, 4096) for _ in range(4)]
    num_bytes = others[0].key.nbytes + others[0].value.nbytes
    for slot in others:
        world.leave(slot)
    full = resident_bytes()
    world.limit_warm(num_bytes)
    assert warm_slots(world) == [(4096, 1)]
    assert full - resident_bytes() > num_bytes * 3 // 2
    world.limit_warm(0)
    assert full - resident_bytes() > num_bytes * 5 // 2
    assert bool((kept.key == 3.0).all())
    world.leave(kept)
    assert not world._all()


def test_where_no_pages_are_given_back_a_slab_goes_with_its_last_warm_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_memory, "GIVES_BACK", False)
    world = slabs(2 * SLOT_BYTES)
    for slot in [written(world) for _ in range(3)]:
        world.leave(slot)
    assert warm_slots(world) == [(64, 0), (64, 1)]
    assert not world._all()[0].key.any()
    world.limit_warm(0)
    assert not world._all()


@pytest.mark.parametrize("bound", [0, 1 << 30])
def test_a_slot_that_cannot_be_made_zero_is_never_handed_out(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    world = slabs(bound)
    kept, slot = written(world), written(world)

    def fails(*args: object) -> None:
        raise OSError("the system takes no pages back")

    with monkeypatch.context() as patched:
        patched.setattr(Slab, "clear", fails)
        patched.setattr(Slab, "wipe", fails)
        with pytest.raises(OSError, match="no pages"):
            world.leave(slot)
    assert world.warm_bytes == 0
    taken = [world.take(64) for _ in range(slab_module.MAX_SLOTS - 1)]
    assert slot.index not in {each.index for each in taken if each.slab is slot.slab}
    assert not any(each.key.any() or each.value.any() for each in taken)
    world.check_invariants()
    assert bool((kept.key[:, :, :16] == 3.0).all())


# In a pool

BLOCK_TOKENS = 4


def pool_of(num_blocks: int = 64, max_warm_bytes: int | None = 1 << 30) -> Pool:
    return Pool(WIDE, num_blocks=num_blocks, block_size=BLOCK_TOKENS, max_warm_bytes=max_warm_bytes)


def filled(pool: Pool, num_tokens: int, number: float) -> Extent:
    extent = pool.allocate(num_tokens)
    extent.key[:], extent.value[:] = number, -number
    return extent


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


class WarmTails(RuleBasedStateMachine):
    """Sequences of several tenants in a pool that is often full: none finds a number that it did not write."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of(num_blocks=40, max_warm_bytes=6 * SLOT_BYTES)
        self.open: list[tuple[Extent, Extent | None, int, float]] = []  # tail, head, tokens written, whose
        self.others: list[Extent] = []
        self.count = 0

    @rule(head_tokens=st.integers(0, 20), tail_tokens=st.integers(1, 90))
    def opens(self, head_tokens: int, tail_tokens: int) -> None:
        self.count += 1
        try:
            head = filled(self.pool, head_tokens, float(self.count)) if head_tokens else None
        except Busy:
            return
        self.open.append((self.pool.open_tail(tail_tokens, head), head, 0, float(self.count)))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), num_tokens=st.integers(1, 20))
    def writes(self, data: st.DataObject, num_tokens: int) -> None:
        at = data.draw(st.integers(0, len(self.open) - 1))
        tail, head, before, number = self.open[at]
        after = min(tail.capacity, before + num_tokens)
        try:
            self.pool.grow(tail, after)
        except Busy:
            return
        tail.key[:, :, before:after], tail.value[:, :, before:after] = number, -number
        self.open[at] = tail, head, after, number

    @precondition(lambda self: self.open)
    @rule(data=st.data(), head_first=st.booleans())
    def closes(self, data: st.DataObject, head_first: bool) -> None:
        tail, head, _, _ = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        extents = [extent for extent in (head, tail) if extent is not None]
        for extent in extents if head_first else reversed(extents):
            self.pool.release(extent)

    @rule(num_tokens=st.integers(1, 100))
    def takes(self, num_tokens: int) -> None:
        try:
            self.others.append(self.pool.allocate(num_tokens))
        except Busy:
            return

    @precondition(lambda self: self.others)
    @rule()
    def gives(self) -> None:
        self.pool.release(self.others.pop())

    @invariant()
    def a_slot_holds_what_its_sequence_wrote_and_zeros(self) -> None:
        for tail, head, num_written, number in self.open:
            slot, end = tail.slot, num_written + (head.capacity if head else 0)
            assert slot is not None
            assert bool((slot.key[:, :, :end] == number).all())
            assert bool((slot.value[:, :, :end] == -number).all())
            assert not slot.key[:, :, end:].any()
            assert not slot.value[:, :, end:].any()
            assert end <= slot.num_written

    @invariant()
    def the_ledger_adds_up(self) -> None:
        self.pool.check_invariants()

    def teardown(self) -> None:
        for tail, head, _, _ in self.open:
            for extent in (tail, head):
                if extent is not None:
                    self.pool.release(extent)
        for extent in self.others:
            self.pool.release(extent)
        self.pool.check_invariants()
        assert self.pool.counts()[BlockState.FREE] == 40
        assert self.pool._slabs.num_slabs == 0


TestWarmTails = WarmTails.TestCase
TestWarmTails.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


# In an engine


def answers(share: float, monkeypatch: pytest.MonkeyPatch) -> tuple[list[torch.Tensor], int]:
    """Logits of every step of requests one after the other and beside each other, and the bytes that are warm then."""
    monkeypatch.setattr(pool_module, "MAX_WARM_SHARE", share)
    engine, seen = engine_of(), list[torch.Tensor]()
    step = engine.decoding.step_logits
    monkeypatch.setattr(engine.decoding, "step_logits", lambda sequences: seen.append(step(sequences)) or seen[-1])
    for seed, num_tokens in ((1, 60), (2, 9), (3, 33), (4, 130), (5, 5)):
        engine.generate(Prompt.live(tokens(num_tokens, seed)), SamplingParams(max_tokens=12, ignore_eos=True))
        drawn = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, seed=seed)
        engine.generate_samples(Prompt.live(tokens(num_tokens + 7, seed + 10)), 3, drawn)
    assert_nothing_held(engine)
    return seen, engine.pool._slabs.warm_bytes


@pytest.mark.parametrize("by_torch", [False, True])
def test_answers_are_the_same_to_the_bit_whoever_had_the_slot_before(
    by_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_torch:
        with torch_kernels_only():
            (cold, none), (warm, some) = (answers(share, monkeypatch) for share in (0.0, 0.5))
    else:
        (cold, none), (warm, some) = (answers(share, monkeypatch) for share in (0.0, 0.5))
    assert (none, some > 0) == (0, True)
    assert len(cold) == len(warm) > 100
    assert all(torch.equal(one, other) for one, other in zip(cold, warm, strict=True))


def test_numbers_that_are_none_stay_with_who_wrote_them() -> None:
    """A model may overflow: what is infinite or no number in a slot must not reach who has it next, masked or not."""
    pool = pool_of()
    for poison in (float("inf"), float("nan")):
        tail = pool.open_tail(40)
        pool.grow(tail, 40)
        tail.key[:], tail.value[:] = poison, poison
        pool.release(tail)
        again = pool.open_tail(3)
        assert again.slot is not None
        assert again.slot.index == 0
        assert not again.slot.key.any()
        assert not again.slot.value.any()
        pool.release(again)
