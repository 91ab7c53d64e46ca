"""The laws of the merge."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_worlds import LAWFUL, assert_same, some_partial

from spolia_kernels import Partial, merge, merge_into
from spolia_kernels.merge import merge_ref

NEG_INF = float("-inf")
MERGES = pytest.mark.parametrize("join", [merge, merge_ref])
seeds = st.lists(st.integers(0, 999), min_size=1, max_size=6)


def double(part: Partial) -> Partial:
    return Partial(part.out.double(), part.lse.double())


def definition(parts: list[Partial]) -> Partial:
    """The equation itself, element by element, in Python floats."""
    import math

    num_q_heads, num_rows, v_dim = parts[0].out.shape
    result = Partial.empty(num_q_heads, num_rows, v_dim, dtype=torch.float64)
    for head, row in itertools.product(range(num_q_heads), range(num_rows)):
        lses = [float(part.lse[head, row]) for part in parts]
        top = max(lses)
        if top == NEG_INF:
            continue
        weights = [math.exp(lse - top) for lse in lses]
        result.lse[head, row] = top + math.log(sum(weights))
        for part, weight in zip(parts, weights, strict=True):
            result.out[head, row] += part.out[head, row].double() * (weight / sum(weights))
    return result


@LAWFUL
@given(seeds=seeds)
def test_merge_equals_its_definition(seeds):
    parts = [some_partial(2, 3, 4, seed=seed) for seed in seeds]
    for join in (merge, merge_ref):
        assert_same(join(parts), definition(parts))


@LAWFUL
@given(seeds=st.lists(st.integers(0, 999), min_size=2, max_size=6), cut=st.integers(1, 5))
def test_merge_is_associative(seeds, cut):
    parts = [some_partial(3, 5, 7, seed=seed) for seed in seeds]
    for join in (merge, merge_ref):
        whole = join(parts)
        left, right = parts[:cut], parts[cut:]
        assert_same(join([join(left), join(right)]) if right else join(left), whole)


@LAWFUL
@given(seeds=seeds, data=st.data())
def test_merge_is_commutative(seeds, data):
    parts = [some_partial(3, 5, 7, seed=seed) for seed in seeds]
    moved = data.draw(st.permutations(parts))
    for join in (merge, merge_ref):
        assert_same(join(moved), join(parts))


@MERGES
def test_an_empty_part_is_neutral_to_the_bit(join):
    part = some_partial(3, 5, 7, seed=1)
    empty = Partial.empty(3, 5, 7)
    for parts in ([part, empty], [empty, part], [empty, part, empty]):
        joined = join(parts)
        assert torch.equal(joined.out, part.out)
        assert torch.equal(joined.lse, part.lse)


@MERGES
def test_empty_parts_merge_to_the_empty_part(join):
    joined = join([Partial.empty(2, 3, 4)] * 3)
    assert (joined.out == 0).all()
    assert (joined.lse == NEG_INF).all()


@MERGES
def test_an_empty_row_counts_nothing_whatever_it_holds(join):
    part = some_partial(2, 4, 3, seed=2, share_empty=0.0)
    garbage = Partial(torch.full((2, 4, 3), float("nan")), torch.full((2, 4), NEG_INF))
    for parts in ([part, garbage], [garbage, part]):
        assert_same(join(parts), part, 1e-7)
    assert (join([garbage, garbage]).out == 0).all()
    acc = Partial(garbage.out.clone(), garbage.lse.clone())
    merge_into(acc, part)
    merge_into(acc, garbage)
    assert_same(acc, part, 1e-7)


@MERGES
def test_far_apart_lses_neither_overflow_nor_underflow_to_nan(join):
    near, far = some_partial(2, 3, 4, seed=3, share_empty=0.0), some_partial(2, 3, 4, seed=4, share_empty=0.0)
    for shift in (200.0, 1e4, 1e30):
        joined = join([near, Partial(far.out, far.lse - shift)])
        assert_same(joined, near)
        joined = join([Partial(near.out, near.lse + shift), far])
        assert torch.equal(joined.out, near.out)


@MERGES
def test_the_parts_are_left_unchanged(join):
    parts = [some_partial(2, 3, 4, seed=seed) for seed in (5, 6)]
    before = [(part.out.clone(), part.lse.clone()) for part in parts]
    joined = join(parts)
    joined.out.fill_(9)
    joined.lse.fill_(9)
    assert all(torch.equal(p.out, o) and torch.equal(p.lse, s) for p, (o, s) in zip(parts, before, strict=True))


def test_the_merge_of_one_part_does_not_alias_it():
    part = some_partial(2, 3, 4, seed=5)
    joined = merge([part])
    assert torch.equal(joined.out, part.out)
    assert joined.out.data_ptr() != part.out.data_ptr()
    assert joined.lse.data_ptr() != part.lse.data_ptr()


def test_float64_parts_merge_in_float64():
    parts = [double(some_partial(2, 3, 4, seed=seed)) for seed in (7, 8, 9)]
    joined = merge(parts)
    assert joined.out.dtype == joined.lse.dtype == torch.float64
    assert_same(joined, definition(parts), 1e-13)


@LAWFUL
@given(
    num_rows=st.integers(1, 9),
    chosen=st.data(),
    how=st.sampled_from(("all", "slice", "index")),
    seed=st.integers(0, 99),
)
def test_merging_into_some_rows_equals_merging_them_alone_and_spares_the_rest(num_rows, chosen, how, seed):
    acc = some_partial(3, num_rows, 4, seed=seed)
    index = torch.arange(num_rows)
    rows: slice | torch.Tensor | None = None
    if how == "slice":
        start = chosen.draw(st.integers(0, num_rows))
        rows = slice(start, chosen.draw(st.integers(start, num_rows)), chosen.draw(st.integers(1, 3)))
        index = index[rows]
    elif how == "index":
        order = chosen.draw(st.permutations(range(num_rows)))
        rows = index = torch.tensor(order[: chosen.draw(st.integers(0, num_rows))], dtype=torch.int64)
    part = some_partial(3, len(index), 4, seed=seed + 100)
    wanted = Partial(acc.out.clone(), acc.lse.clone())
    joined = merge_ref([Partial(acc.out[:, index], acc.lse[:, index]), part])
    wanted.out[:, index], wanted.lse[:, index] = joined.out, joined.lse
    spared = [row for row in range(num_rows) if row not in index.tolist()]
    before = acc.out[:, spared].clone(), acc.lse[:, spared].clone()
    part_before = part.out.clone(), part.lse.clone()
    merge_into(acc, part, rows)
    assert_same(acc, wanted)
    assert torch.equal(acc.out[:, spared], before[0])
    assert torch.equal(acc.lse[:, spared], before[1])
    assert torch.equal(part.out, part_before[0])
    assert torch.equal(part.lse, part_before[1])


def test_merging_part_after_part_in_place_equals_one_merge():
    parts = [some_partial(3, 4, 5, seed=seed) for seed in range(8)]
    acc = Partial.empty(3, 4, 5)
    for part in parts:
        merge_into(acc, part)
    assert_same(acc, merge(parts))


def test_merge_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        merge([])


@pytest.mark.parametrize(
    "other",
    [
        Partial.empty(2, 3, 5),
        Partial.empty(2, 4, 4),
        Partial.empty(1, 3, 4),
        Partial.empty(2, 3, 4, dtype=torch.float64),
    ],
)
def test_parts_that_do_not_match_are_refused(other):
    part = Partial.empty(2, 3, 4)
    with pytest.raises(ValueError, match="unequal"):
        merge([part, other])
    with pytest.raises(ValueError, match="unequal"):
        merge_into(part, other)
    with pytest.raises(ValueError, match="unequal"):
        merge_into(Partial.empty(2, 9, 4), other, torch.tensor([1, 5, 7]))


def test_rows_that_do_not_exist_are_refused_and_nothing_changes():
    acc = some_partial(2, 3, 4, seed=1)
    before = acc.out.clone(), acc.lse.clone()
    part = some_partial(2, 2, 4, seed=2)
    with pytest.raises(IndexError):
        merge_into(acc, part, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="unequal"):
        merge_into(acc, part, slice(2, 4))
    with pytest.raises(ValueError, match="int64"):
        merge_into(acc, part, torch.tensor([0, 1], dtype=torch.int32))
    assert torch.equal(acc.out, before[0])
    assert torch.equal(acc.lse, before[1])
