"""Slots that stay in pages: zero, within their bound, and the ledger's as soon as it wants them."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from warm_worlds import PAGE, SLOT_BYTES, WIDE, gives_back, warm_slots

from spolia_core.chunk_object import KvShape
from spolia_engine import lazy_memory
from spolia_engine import slab as slab_module
from spolia_engine.slab import Slab, Slabs, Slot


def slabs(max_warm_bytes: int, shape: KvShape = WIDE) -> Slabs:
    world = Slabs(shape, torch.float32, torch.device("cpu"))
    world.limit_warm(max_warm_bytes)
    return world


def written(world: Slabs, num_tokens: int = 16, capacity: int = 64) -> Slot:
    slot = world.take(capacity)
    slot.num_written = num_tokens
    slot.key[:, :, :num_tokens], slot.value[:, :, :num_tokens] = 3.0, 4.0
    return slot


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
