"""Tails and what moves beside them: numbers stay, slots are zero again, and the ledger adds up after every move."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from spolia_core.chunk_object import KvShape
from spolia_core.errors import Busy
from spolia_core.reuse import ChunkKind
from spolia_engine import lazy_memory
from spolia_engine import slab as slab_module
from spolia_engine.extent import BlockState, Extent
from spolia_engine.pool import Pool
from spolia_engine.resident import ResidentChunks
from spolia_engine.run import Run
from spolia_engine.slab import Slabs, Slot

SHAPE = KvShape(2, 2, 4, 4, "F32")
NUM_BLOCKS, BLOCK_SIZE = 40, 4


def slabs() -> Slabs:
    return Slabs(SHAPE, torch.float32, torch.device("cpu"))


def test_slots_are_taken_from_the_lowest_on() -> None:
    world = slabs()
    taken = [world.take(10) for _ in range(4)]
    assert [slot.index for slot in taken] == [0, 1, 2, 3]
    assert len({id(slot.slab) for slot in taken}) == 1
    world.leave(taken[1])
    assert world.take(64).index == 1
    assert world.take(65).slab is not taken[0].slab


@pytest.mark.parametrize(("num_tokens", "capacity"), [(1, 64), (64, 64), (65, 128), (1000, 1024), (1025, 2048)])
def test_capacity_is_the_next_power_of_two(num_tokens: int, capacity: int) -> None:
    slot = slabs().take(num_tokens)
    assert slot.slab.capacity == capacity
    assert slot.key.shape == (2, 2, capacity, 4)


def test_a_full_slab_is_followed_by_another_and_an_empty_one_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab_module, "MAX_SLOTS", 2)
    world = slabs()
    taken = [world.take(10) for _ in range(3)]
    assert world.num_slabs == 2
    for slot in taken:
        world.leave(slot)
    assert world.num_slabs == 0


def test_a_slab_of_long_slots_has_few() -> None:
    slot_bytes = SHAPE.bytes_per_token * (1 << 20)
    assert slabs().take(1 << 20).slab.num_slots == slab_module.MAX_LAZY_SLAB_BYTES // slot_bytes


@pytest.mark.parametrize("num_tokens", [10, 700])
@pytest.mark.parametrize("gives_back", [True, False])
def test_a_slot_left_is_zero_and_its_neighbours_are_not(
    num_tokens: int, gives_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_memory, "GIVES_BACK", gives_back and lazy_memory.GIVES_BACK)
    world = slabs()
    first, slot, last = (world.take(num_tokens) for _ in range(3))
    for each in (first, slot, last):
        each.key[:], each.value[:] = 3.0, 4.0
    world.leave(slot)
    again = world.take(num_tokens)
    assert again.index == slot.index
    assert not again.key.any()
    assert not again.value.any()
    for kept in (first, last):
        assert bool((kept.key == 3.0).all())
        assert bool((kept.value == 4.0).all())


def filled(pool: Pool, num_tokens: int, number: float) -> Extent:
    extent = pool.allocate(num_tokens)
    extent.key[:], extent.value[:] = number, -number
    return extent


def test_a_head_moves_beside_the_tail_and_whoever_read_it_reads_on() -> None:
    pool = Pool(SHAPE, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    head = filled(pool, 6, 2.0)
    seen = head.key
    tail = pool.open_tail(5, head)
    assert tail.slot is head.slot
    assert head.key is not seen
    assert torch.equal(head.key, seen)
    slot = tail.slot
    assert slot is not None
    pool.grow(tail, 5)
    tail.key[:] = 7.0
    assert bool((slot.key[:, :, :6] == 2.0).all())
    assert bool((slot.key[:, :, 6:11] == 7.0).all())
    assert not slot.key[:, :, 11:].any()
    assert pool.counts()[BlockState.REFERENCED] == 2 + 1, "two tokens of the tail are in the last block of the head"


def test_a_cached_head_makes_place_and_keeps_its_numbers() -> None:
    pool = Pool(SHAPE, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    resident = ResidentChunks(pool)
    head = filled(pool, 4, 2.0)
    resident.register(b"a", ChunkKind.PREFIX, Run(head, 0, 4, 0))
    tail = pool.open_tail(5, head)
    pool.release(tail)
    assert pool._slabs.num_slabs == 1, "the head is still in it"
    pool.release(head)
    assert head.state is BlockState.CACHED
    assert pool._slabs.num_slabs == 0
    run = resident.acquire(b"a")
    assert run is not None
    assert bool((run.extent.key == 2.0).all())
    assert bool((run.extent.value == -2.0).all())


def test_growing_takes_what_is_lacking_or_nothing() -> None:
    pool = Pool(SHAPE, num_blocks=3, block_size=BLOCK_SIZE)
    tail = pool.open_tail(20)
    assert pool.counts()[BlockState.REFERENCED] == 0
    for num_tokens, blocks in ((1, 1), (4, 1), (5, 2), (12, 3)):
        pool.grow(tail, num_tokens)
        assert pool.counts()[BlockState.REFERENCED] == blocks
    with pytest.raises(Busy):
        pool.grow(tail, 13)
    assert pool.counts()[BlockState.REFERENCED] == 3
    pool.release(tail)
    pool.check_invariants()
    assert pool.counts()[BlockState.FREE] == 3


class TailMachine(RuleBasedStateMachine):
    """Sequences that open tails, write, end in any order, and share what they registered."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(SHAPE, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
        self.resident = ResidentChunks(self.pool)
        self.open: list[tuple[Extent, Extent | None, int]] = []  # tail, head, tokens written
        self.readers: list[Run] = []
        self.numbers: dict[Extent, float] = {}
        self.count = 0

    @rule(head_tokens=st.integers(0, 9), tail_tokens=st.integers(1, 12), is_chunk=st.booleans())
    def opens(self, head_tokens: int, tail_tokens: int, is_chunk: bool) -> None:
        self.count += 1
        head = None
        if head_tokens:
            try:
                head = filled(self.pool, head_tokens, float(self.count))
            except Busy:
                return
            self.numbers[head] = float(self.count)
            if is_chunk:
                run = Run(head, 0, head_tokens, 0)
                self.resident.register(self.count.to_bytes(4, "big"), ChunkKind.LOCAL, run)
        self.open.append((self.pool.open_tail(tail_tokens, head), head, 0))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def writes(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.open) - 1))
        tail, head, written = self.open[at]
        if written == tail.capacity:
            return
        try:
            self.pool.grow(tail, written + 1)
        except Busy:
            return
        tail.key[:, :, written] = 1000.0 + written
        self.open[at] = tail, head, written + 1

    @precondition(lambda self: self.open)
    @rule(data=st.data(), head_first=st.booleans())
    def closes(self, data: st.DataObject, head_first: bool) -> None:
        tail, head, _ = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        extents = [extent for extent in (head, tail) if extent is not None]
        for extent in extents if head_first else reversed(extents):
            self.pool.release(extent)

    @rule(number=st.integers(1, 20))
    def reads(self, number: int) -> None:
        run = self.resident.acquire(number.to_bytes(4, "big"))
        if run is not None:
            self.readers.append(run)

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def stops_reading(self, data: st.DataObject) -> None:
        self.pool.release(self.readers.pop(data.draw(st.integers(0, len(self.readers) - 1))).extent)

    @invariant()
    def numbers_stay(self) -> None:
        for run in self.readers:
            assert bool((run.extent.key == self.numbers[run.extent]).all())
        for tail, head, written in self.open:
            slot, first = slot_of(tail), head.capacity if head else 0
            if head is not None:
                assert bool((slot.key[:, :, :first] == self.numbers[head]).all())
            for token in range(written):
                assert bool((slot.key[:, :, first + token] == 1000.0 + token).all())
            assert not slot.key[:, :, first + written :].any(), "what lies past a length is zero"

    @invariant()
    def the_ledger_adds_up(self) -> None:
        self.pool.check_invariants()
        assert sum(self.pool.counts().values()) == NUM_BLOCKS

    def teardown(self) -> None:
        for tail, head, _ in self.open:
            self.pool.release(tail)
            if head is not None:
                self.pool.release(head)
        for run in self.readers:
            self.pool.release(run.extent)
        counts = self.pool.counts()
        assert counts[BlockState.FREE] + counts[BlockState.CACHED] == NUM_BLOCKS
        assert self.pool._slabs.num_slabs == 0


def slot_of(tail: Extent) -> Slot:
    assert tail.slot is not None
    return tail.slot


TestTails = TailMachine.TestCase
TestTails.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_slab_takes_pages_only_as_they_are_written() -> None:
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        pytest.skip("resident memory is read from /proc")

    def resident_bytes() -> int:
        return int(statm.read_text().split()[1]) * mmap.PAGESIZE

    before = resident_bytes()
    shape = KvShape(2, 2, 64, 64, "F32")
    slot = Slabs(shape, torch.float32, torch.device("cpu")).take(4096)
    held = slot.slab.key.nbytes + slot.slab.value.nbytes
    assert held > 256 << 20
    assert resident_bytes() - before < held // 8
    slot.key[:] = 1.0
    assert bool((slot.key == 1.0).all())
    assert not slot.value.any()


@pytest.mark.parametrize(("first", "last"), [(0, 10), (1000, 1030), (1000, 9000), (1024, 4096), (0, 9999)])
def test_a_part_is_cleared_wherever_it_begins_and_ends(first: int, last: int) -> None:
    memory = lazy_memory.LazyZeros((10_000,), torch.float32, torch.device("cpu"))
    memory.tensor[:] = 5.0
    memory.clear(memory.tensor[first:last])
    assert not memory.tensor[first:last].any()
    assert int((memory.tensor == 5.0).sum()) == 10_000 - (last - first)


@pytest.mark.skipif(not lazy_memory.GIVES_BACK, reason="this system gives no pages back in place")
def test_a_slot_left_gives_its_pages_back() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    world = Slabs(KvShape(2, 2, 64, 64, "F32"), torch.float32, torch.device("cpu"))
    kept, slot = world.take(16384), world.take(16384)
    kept.key[:, :, :1] = 1.0
    before = resident_bytes()
    slot.key[:], slot.value[:] = 1.0, 1.0
    num_bytes = slot.key.nbytes + slot.value.nbytes
    assert resident_bytes() - before > num_bytes // 2
    world.leave(slot)
    assert resident_bytes() - before < num_bytes // 8
