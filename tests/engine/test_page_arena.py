"""Ranges of pages against a list that says of every page whether it is taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spolia_core.chunk_object import KvShape
from spolia_core.errors import Busy
from spolia_engine.extent import BlockState
from spolia_engine.page_arena import PageArena
from spolia_engine.pool import Pool
from spolia_engine.slot_memory import SlotMemory

NUM_PAGES = 24
LAWFUL = settings(derandomize=True, deadline=None, max_examples=60, database=None)


@LAWFUL
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=60))
def test_free_pages_come_in_as_few_ranges_as_they_allow_and_never_twice(moves: list[tuple[bool, int]]) -> None:
    arena, taken, held = PageArena(NUM_PAGES), [False] * NUM_PAGES, list[tuple[int, int]]()
    for takes, size in moves:
        if takes and size <= taken.count(False):
            free = sorted(map(len, "".join("x" if each else " " for each in taken).split("x")))
            fewest = next(n for n in range(1, len(free) + 1) if sum(free[-n:]) >= size)
            assert arena.num_ranges(size) == fewest
            found = arena.take(size)
            assert len(found) == fewest
            assert sum(count for _, count in found) == size
            assert found == sorted(found)
            for first, count in found:
                assert not any(taken[first : first + count])
                taken[first : first + count] = [True] * count
            left = sorted(map(len, "".join("x" if each else " " for each in taken).split("x")))
            if fewest == 1:  # cut from the smallest that holds it
                used = min(count for count in free if count >= size)
                free.remove(used)
                assert sorted(filter(None, [*free, used - size])) == [n for n in left if n]
            held += found
        elif held and not takes:
            first, count = held.pop(size % len(held))
            half = count // 2  # a range may come back in parts
            for part, length in ((first, half), (first + half, count - half)):
                if length:
                    arena.give_back(part, length)
            taken[first : first + count] = [False] * count
        arena.check_invariants()
        assert arena.num_free == taken.count(False)


@pytest.mark.parametrize(("first", "count"), [(0, 2), (3, 2), (7, 1)])
def test_pages_that_are_free_are_not_given_back(first: int, count: int) -> None:
    arena = PageArena(8)
    assert arena.take(4) == [(0, 4)]
    arena.give_back(0, 1)
    with pytest.raises(AssertionError):
        arena.give_back(first, count)


SHAPE = KvShape(2, 2, 4, 4, "F32")


def _memory() -> SlotMemory:
    return SlotMemory(SHAPE, num_pages=8, page_size=16, dtype=torch.float32, device="cpu")


def _pool(memory: SlotMemory | None = None) -> Pool:
    return Pool(SHAPE, num_blocks=8, block_size=16, slots=memory or _memory())


def test_extents_lie_in_one_memory_and_the_ledger_counts_its_pages() -> None:
    pool = _pool()
    first, second = pool.allocate(17), pool.allocate(16)
    assert [extent.pieces[0].first_slot for extent in (first, second)] == [0, 32]
    first.key.fill_(1.0)
    second.key.fill_(2.0)
    assert bool((first.key == 1.0).all())
    pool.check_invariants()
    assert pool.counts()[BlockState.REFERENCED] == 3
    pool.release(first)
    pool.check_invariants()
    assert pool.allocate(30).pieces[0].first_slot == 0


def test_a_tail_begins_with_a_copy_of_what_its_head_has_in_a_page_that_is_not_full() -> None:
    memory = _memory()
    pool = _pool(memory)
    head = pool.allocate(21)
    head.key.normal_()
    tail = pool.open_tail(40, head)
    assert tail.pieces[0].first_slot == 32 + 5  # the head's two pages, then a copy of its last five tokens
    assert (tail.num_blocks, tail.capacity) == (3, 40)
    assert bool((memory.pieces([(2, 1)], 5)[0].key == head.key[:, :, 16:]).all())
    pool.grow(tail, 40)
    pool.release(head)
    pool.release(tail)
    pool.check_invariants()
    assert pool.counts()[BlockState.FREE] == 8


def test_a_head_in_pieces_is_copied_from_where_its_last_page_lies() -> None:
    memory = _memory()
    pool = _pool(memory)
    every = [pool.allocate(16) for _ in range(8)]
    for number in (1, 3, 5, 6, 7):
        pool.release(every[number])
    head = pool.allocate(16 * 3 + 5)  # three pages side by side, then one of the single ones
    assert [piece.first_slot for piece in head.pieces] == [16, 80]
    head.write(slice(None), 0, *torch.randn(2, 2, 2, 53, 4))
    tail = pool.open_tail(7, head)
    (piece,) = tail.pieces
    assert piece.first_slot is not None
    copied = memory.pieces([(piece.first_slot // 16, 1)], 5)[0]
    assert bool((copied.key == head.pieces[-1].key[:, :, -5:]).all())
    assert bool((copied.value == head.pieces[-1].value[:, :, -5:]).all())
    pool.check_invariants()


def test_the_cache_makes_room_for_one_piece_where_single_blocks_suffice() -> None:
    pool = _pool()
    extents = [pool.allocate(16) for _ in range(8)]
    for number in (1, 3, 5):
        extents[number].chunk_ids.add(b"%d" % number)
    for number in (0, 1, 2, 3, 5):
        pool.release(extents[number])
    assert pool.counts()[BlockState.FREE] == 2
    assert pool.counts()[BlockState.CACHED] == 3
    assert [piece.first_slot for piece in pool.allocate(30).pieces] == [0]
    assert pool.counts()[BlockState.CACHED] == 2  # between the two that were free
    pool.check_invariants()


def test_for_fewer_pieces_goes_as_much_of_the_cache_as_is_asked_for_and_no_more() -> None:
    pool = _pool()
    extents = [pool.allocate(16) for _ in range(8)]
    for extent in extents[::2]:
        pool.release(extent)
    for extent in extents[3::4]:
        extent.chunk_ids.add(b"chunk")
        pool.release(extent)
    assert pool.counts()[BlockState.CACHED] == 2
    with pool.sparing_cache():
        spared = pool.allocate(32)
    assert len(spared.pieces) == 2
    assert pool.counts()[BlockState.CACHED] == 2
    pool.release(spared)
    one = pool.allocate(16)
    assert (len(one.pieces), pool.counts()[BlockState.CACHED]) == (1, 2)
    pool.release(one)
    assert len(pool.allocate(48).pieces) == 1  # 2, 3 and 4
    assert pool.counts()[BlockState.CACHED] == 1
    pool.check_invariants()


def test_what_is_referenced_is_all_that_refuses() -> None:
    pool = _pool()
    extents = [pool.allocate(16) for _ in range(8)]
    for extent in extents[::2]:
        pool.release(extent)
    with pytest.raises(Busy, match="4 blocks available, 5 are needed"):
        pool.allocate(65)
    assert [piece.first_slot for piece in pool.allocate(64).pieces] == [0, 32, 64, 96]
    pool.check_invariants()
