"""Ranges of pages against a list that says of every page whether it is taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spolia_core.chunk_object import KvShape
from spolia_core.errors import Busy
from spolia_engine.page_arena import PageArena
from spolia_engine.pool import BlockState, Pool
from spolia_engine.slot_memory import SlotMemory

NUM_PAGES = 24
LAWFUL = settings(derandomize=True, deadline=None, max_examples=60, database=None)


@LAWFUL
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=60))
def test_ranges_are_the_lowest_that_are_free_and_never_overlap(moves: list[tuple[bool, int]]) -> None:
    arena, taken, held = PageArena(NUM_PAGES), [False] * NUM_PAGES, list[tuple[int, int]]()
    for takes, size in moves:
        if takes:
            starts = range(NUM_PAGES - size + 1)
            lowest = next((i for i in starts if not any(taken[i : i + size])), None)
            found = arena.take(size)
            assert found == lowest
            if found is not None:
                taken[found : found + size] = [True] * size
                held.append((found, size))
        elif held:
            first, count = held.pop(size % len(held))
            half = count // 2  # a range may come back in parts
            for part, length in ((first, half), (first + half, count - half)):
                if length:
                    arena.give_back(part, length)
            taken[first : first + count] = [False] * count
        arena.check_invariants()
        assert arena.num_free == taken.count(False)
        would_be = taken.copy()
        for first, count in held[::2]:
            would_be[first : first + count] = [False] * count
        runs = "".join("x" if each else " " for each in would_be).split("x")
        assert arena.longest_with(held[::2]) == max(map(len, runs))


@pytest.mark.parametrize(("first", "count"), [(0, 2), (3, 2), (7, 1)])
def test_pages_that_are_free_are_not_given_back(first: int, count: int) -> None:
    arena = PageArena(8)
    assert arena.take(4) == 0
    arena.give_back(0, 1)
    with pytest.raises(AssertionError):
        arena.give_back(first, count)


SHAPE = KvShape(2, 2, 4, 4, "F32")


def _memory() -> SlotMemory:
    return SlotMemory(SHAPE, num_pages=8, page_size=16, dtype=torch.float32, device="cpu")


def _pool(memory: SlotMemory | None = None) -> Pool:
    return Pool(SHAPE, num_blocks=8, block_size=16, slots=memory or _memory())


def test_extents_are_ranges_of_one_memory_and_the_ledger_counts_its_pages() -> None:
    pool = _pool()
    first, second = pool.allocate(17), pool.allocate(16)
    assert (first.first_slot, second.first_slot) == (0, 32)
    first.key.fill_(1.0)
    second.key.fill_(2.0)
    assert bool((first.key == 1.0).all())
    pool.check_invariants()
    assert pool.counts()[BlockState.REFERENCED] == 3
    pool.release(first)
    pool.check_invariants()
    assert pool.allocate(30).first_slot == 0


def test_a_tail_begins_with_a_copy_of_what_its_head_has_in_a_page_that_is_not_full() -> None:
    memory = _memory()
    pool = _pool(memory)
    head = pool.allocate(21)
    head.key.normal_()
    tail = pool.open_tail(40, head)
    assert tail.first_slot == 32 + 5  # the head's two pages, then a copy of its last five tokens
    assert (tail.num_blocks, tail.capacity) == (3, 40)
    assert bool((memory.at(32, 5)[0] == head.key[:, :, 16:]).all())
    pool.grow(tail, 40)
    pool.release(head)
    pool.release(tail)
    pool.check_invariants()
    assert pool.counts()[BlockState.FREE] == 8


def test_what_is_cached_makes_room_for_a_range_though_single_blocks_suffice() -> None:
    pool = _pool()
    extents = [pool.allocate(16) for _ in range(8)]
    for number in (1, 3, 5):
        extents[number].chunk_ids.add(b"%d" % number)
    for number in (0, 1, 2, 3, 5):
        pool.release(extents[number])
    assert pool.counts()[BlockState.FREE] == 2
    assert pool.counts()[BlockState.CACHED] == 3
    assert pool.allocate(33).first_slot == 0  # three in a row: one of the cached had to go
    pool.check_invariants()


def test_nothing_is_evicted_for_a_range_that_could_not_come_of_it() -> None:
    pool = _pool()
    extents = [pool.allocate(16) for _ in range(8)]
    for extent in extents[::2]:
        extent.chunk_ids.add(b"chunk")
        pool.release(extent)
    with pytest.raises(Busy, match="only 1 side by side"):
        pool.allocate(32)
    assert pool.counts()[BlockState.CACHED] == 4
    pool.release(extents[3])
    assert pool.allocate(48).first_slot == 32
    pool.check_invariants()
