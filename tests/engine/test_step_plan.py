"""The decode plan: whoever reads a token reads it once, and readers of the same tokens read them together."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spolia_core.chunk_object import KvShape
from spolia_engine.extent import Extent, Piece
from spolia_engine.pool import Pool
from spolia_engine.run import Run, SlotRange, Span, coalesce
from spolia_engine.sharing import Sharing, always_shared, never_shared
from spolia_engine.step_plan import Group, Tail, plan_step

CAPACITY = 12


def extent() -> Extent:
    return Extent((Piece(0, torch.empty(1, 1, CAPACITY, 2), torch.empty(1, 1, CAPACITY, 2)),), 1)


EXTENTS = [extent(), extent(), extent()]
SHAPE = KvShape(1, 1, 2, 2, "F32")
Use = tuple[int, int, int, int]  # extent, start, end, offset


def tails(count: int) -> list[Tail]:
    pool = Pool(SHAPE, num_blocks=64)
    return [Tail(pool.open_tail(8), rope_base=0) for _ in range(count)]


def plan(contexts: list[list[Use]], sharing: Sharing = always_shared) -> tuple[Group, ...]:
    ranges = [[SlotRange(EXTENTS[e], start, end, offset) for e, start, end, offset in uses] for uses in contexts]
    result = plan_step(ranges, tails(len(contexts)), sharing)
    assert result.order == tuple(range(len(contexts))), "tails were opened in order"
    return result.groups


def readers(group: Group, num_rows: int) -> list[tuple[int, int]]:
    """(row, offset) of a group."""
    assert len(group.rows) == len(set(group.rows)), "a row twice in one product would lose one of the two"
    assert set(group.rows) <= set(range(num_rows))
    return list(zip(group.rows, group.offsets, strict=True))


def reads(groups: tuple[Group, ...], num_rows: int) -> Counter[tuple[int, int, int, int]]:
    """How often each row reads each slot at each offset."""
    found: Counter[tuple[int, int, int, int]] = Counter()
    for group in groups:
        for row, offset in readers(group, num_rows):
            for slot in range(group.slots.start, group.slots.end):
                found[row, EXTENTS.index(group.slots.extent), slot, offset] += 1
    return found


def wanted(contexts: list[list[Use]]) -> Counter[tuple[int, int, int, int]]:
    return Counter(
        (row, e, slot, offset)
        for row, uses in enumerate(contexts)
        for e, start, end, offset in uses
        for slot in range(start, end)
    )


@st.composite
def uses(draw: st.DrawFn) -> Use:
    start = draw(st.integers(0, CAPACITY - 1))
    end = draw(st.integers(start + 1, CAPACITY))
    return draw(st.integers(0, 2)), start, end, draw(st.sampled_from([0, 0, 7, 31]))


@given(st.lists(st.lists(uses(), max_size=4), min_size=1, max_size=5))
@settings(max_examples=300, deadline=None)
def test_every_row_reads_every_slot_as_often_as_it_asked(contexts: list[list[Use]]) -> None:
    groups = plan(contexts)
    assert reads(groups, len(contexts)) == wanted(contexts)
    assert all(group.slots.start < group.slots.end for group in groups)


@given(st.lists(st.lists(uses(), max_size=1), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_a_slot_is_read_in_one_product_whoever_reads_it(contexts: list[list[Use]]) -> None:
    groups = plan(contexts)
    slots = [(EXTENTS.index(g.slots.extent), slot) for g in groups for slot in range(g.slots.start, g.slots.end)]
    assert len(slots) == len(set(slots))


def described(contexts: list[list[Use]]) -> list[tuple[int, int, int, list[tuple[int, int]]]]:
    return [
        (EXTENTS.index(g.slots.extent), g.slots.start, g.slots.end, readers(g, len(contexts))) for g in plan(contexts)
    ]


def test_readers_of_different_k_share_the_rest() -> None:
    contexts = [[(0, 0, 10, 5)], [(0, 2, 10, 9)], [(0, 4, 10, 0)]]
    assert described(contexts) == [
        (0, 0, 2, [(0, 5)]),
        (0, 2, 4, [(0, 5), (1, 9)]),
        (0, 4, 10, [(0, 5), (1, 9), (2, 0)]),
    ]


def test_a_document_twice_in_one_prompt_is_read_twice() -> None:
    contexts = [[(0, 2, 10, 5), (0, 2, 10, 40)], [(0, 2, 10, 11)]]
    assert described(contexts) == [(0, 2, 10, [(0, 5), (1, 11)]), (0, 2, 10, [(0, 40)])]


def test_the_switch_is_asked_about_rows_and_tokens_of_every_piece_that_several_read() -> None:
    asked = []

    def sharing(num_rows: int, num_tokens: int) -> bool:
        asked.append((num_rows, num_tokens))
        return num_tokens > 4

    contexts = [[(0, 0, 10, 5)], [(0, 3, 10, 9)], [(1, 0, 4, 0)], [(1, 0, 4, 0)]]
    groups = plan(contexts, sharing)
    assert asked == [(2, 7), (2, 4)]
    assert [group.shared for group in groups] == [False, True, False]


@given(st.lists(st.lists(uses(), max_size=4), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_where_the_table_says_private_the_plan_is_the_private_plan(contexts: list[list[Use]]) -> None:
    private, switched = plan(contexts, never_shared), plan(contexts, lambda rows, tokens: False)
    assert [replace(group, slots=EXTENTS[0]) for group in switched] == [replace(g, slots=EXTENTS[0]) for g in private]
    assert [memory(group) for group in switched] == [memory(group) for group in private]
    assert not any(group.shared for group in private)


def memory(group: Group) -> tuple[Extent, int, int]:
    return group.slots.extent, group.slots.start, group.slots.end


def test_rows_are_ordered_by_where_their_tails_lie() -> None:
    pool = Pool(SHAPE, num_blocks=64)
    small = [Tail(pool.open_tail(8), 0) for _ in range(4)]
    large = [Tail(pool.open_tail(200), 0) for _ in range(2)]
    batch = [small[2], large[1], small[0], small[3], large[0]]
    result = plan_step([[] for _ in batch], batch)
    assert sorted(result.order) == list(range(5))
    ordered = [batch[number] for number in result.order]
    found = [[(stretch.slab, stretch.first_slot + i) for i in range(stretch.num_rows)] for stretch in result.stretches]
    assert [(tail.slot.slab, tail.slot.index) for tail in ordered] == [place for places in found for place in places]
    assert sorted(stretch.num_rows for stretch in result.stretches) == [1, 2, 2], "slot 1 of the small slab is not here"
    assert [stretch.first_row for stretch in result.stretches] == [
        sum(s.num_rows for s in result.stretches[:i]) for i in range(3)
    ]


def test_pieces_read_alike_are_one_group() -> None:
    contexts = [[(0, 0, 4, 3), (0, 4, 9, 3)], [(0, 0, 9, 8)]]
    assert described(contexts) == [(0, 0, 9, [(0, 3), (1, 8)])]


def test_nothing_shared_is_nothing_planned() -> None:
    assert plan([[], []]) == ()


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 3)), max_size=6))
def test_coalesced_spans_hold_the_same_slots(parts: list[tuple[int, int, int]]) -> None:
    spans, position = [], 0
    for e, length, gap in parts:  # disjoint in memory, as the tokens of a context are
        spans.append(Span(Run(EXTENTS[e], 100 * position, 50, 0), gap, gap + length, 7 * (gap % 2)))
        position += 1 if gap else 0
    ranges = coalesce(spans)
    found = Counter((r.extent, slot, r.offset) for r in ranges for slot in range(r.start, r.end))
    asked = Counter((s.run.extent, slot, s.offset) for s in spans for slot in range(s.slots.start, s.slots.end))
    assert set(found) == set(asked)
    assert all(r.start < r.end for r in ranges)


def test_neighbours_in_memory_under_one_offset_are_one_range() -> None:
    first, second = Run(EXTENTS[0], 0, 4, 0), Run(EXTENTS[0], 4, 4, 4)
    (joined,) = coalesce([Span(second, 0, 4, 0), Span(first, 0, 4, 0)])
    assert (joined.start, joined.end) == (0, 8)
    assert len(coalesce([Span(first, 0, 4, 0), Span(second, 0, 4, 3)])) == 2
    assert len(coalesce([Span(first, 0, 3, 0), Span(second, 0, 4, 0)])) == 2
    assert coalesce([Span(first, 2, 2, 0)]) == []
