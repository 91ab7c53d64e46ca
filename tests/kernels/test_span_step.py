"""The laws of a step's attention in two calls a layer, held against the same row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_worlds import GQA_RATIOS, LAWFUL
from step_worlds import LAYERS, SCALE, SOME, Step, step_of

from spolia_kernels import Rotation, SlotRows, SpanRange, SpanStep, span_kernels
from spolia_kernels.native.kernels import Kernels, kernels, torch_kernels_only
from spolia_kernels.native.tasks import ITEM, SLOT
from spolia_kernels.native.team import parallel
from spolia_kernels.span_step import items, span_step_ref

pytestmark = pytest.mark.skipif(not isinstance(kernels(), Kernels), reason="no machine code is to be had here")


def assert_right(step: Step, here: Kernels | None = None) -> None:
    """The same attention, and the same memory, as by its definition."""
    wanted = step.copy()
    for got, expected in zip(step.native(here), wanted.reference(), strict=True):
        assert not got.isnan().any()
        assert (got - expected).abs().max() < 1e-5
    for one, other in zip(step.slots, wanted.slots, strict=True):
        assert torch.equal(one.key, other.key)
        assert torch.equal(one.value, other.value)


@pytest.mark.parametrize("ratio", GQA_RATIOS)
def test_it_equals_its_definition_at_every_gqa_ratio(ratio):
    assert_right(step_of(9, SOME, ratio=ratio))


@pytest.mark.parametrize("head_dim", [4, 8, 16, 48, 64, 128])
def test_it_equals_its_definition_at_every_width(head_dim):
    assert_right(step_of(9, SOME, head_dim=head_dim))
    assert_right(step_of(9, SOME, head_dim=head_dim, v_dim=2 * head_dim))
    assert_right(step_of(9, SOME, head_dim=2 * head_dim, rotary_dim=head_dim))


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_every_form_that_runs_here_is_right(lanes):
    here = kernels()
    assert isinstance(here, Kernels)
    if lanes > here.lanes:
        pytest.skip("this processor has no vectors that wide")
    assert_right(step_of(40, [(300, tuple(range(40)), True, True), *SOME]), Kernels(lanes, parallel()))


@given(st.data())
@LAWFUL
def test_any_batch_is_right(data):
    rows = data.draw(st.integers(1, 40))
    each = st.tuples(
        st.integers(1, 200),
        st.lists(st.integers(0, rows - 1), min_size=1, unique=True).map(lambda found: tuple(sorted(found))),
        st.booleans(),
        st.booleans(),
    )
    readers = data.draw(st.lists(each, max_size=5))
    ratio, stretches = data.draw(st.sampled_from(GQA_RATIOS)), data.draw(st.integers(1, 3))
    assert_right(step_of(rows, readers, ratio=ratio, stretches=stretches, seed=rows))


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_long_ranges_are_cut_for_any_number_of_threads(num_threads, monkeypatch):
    monkeypatch.setattr(items, "_MIN_KEYS_PER_CUT", 8)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        step = step_of(3, [(400, (0, 1, 2), True, True), (300, (1,), True, False)], heads=1)
        assert_right(step)
    finally:
        torch.set_num_threads(before)


def test_a_step_writes_behind_the_last_one():
    step = step_of(5, [(70, (0, 1, 4), True, True)])
    wanted = step.copy()
    native = SpanStep(span_kernels(step.slots, step.ranges), step.slots, step.ranges, 2)
    for number in range(3):
        lens = [number + 1 + row for row in range(5)]
        native.begin(lens)
        rows = [torch.randn_like(x) for x in (step.query, step.key, step.value)]
        for layer in range(LAYERS):
            expected = span_step_ref(wanted.slots, wanted.ranges, lens, layer, *rows, SCALE)
            assert (native(layer, *rows, SCALE) - expected).abs().max() < 1e-5
    assert torch.equal(step.slots[0].key, wanted.slots[0].key)


def test_what_stands_behind_a_rows_last_key_is_not_read():
    step = step_of(6, [(20, (0, 1, 5), True, True)])
    for row, length in enumerate(step.lens):
        step.slots[0].key[:, row, :, length:] = float("nan")
        step.slots[0].value[:, row, :, length:] = float("nan")
    assert all(not found.isnan().any() for found in step.native())


def test_what_is_not_a_number_stays_so_in_its_row_and_head():
    step = step_of(6, [(20, (0, 1, 5), False, True)])
    step.query[1, 5, 3] = float("nan")
    for found in step.native():
        assert found[1, 5].isnan().all()
        found[1, 5] = 0.0
        assert not found.isnan().any()


def test_a_row_gets_the_same_bits_whoever_else_is_in_the_step():
    whole = step_of(20, [(300, tuple(range(20)), True, True)], heads=4)
    few = SpanRange(
        whole.ranges[0].key,
        whole.ranges[0].value,
        tuple(range(12)),
        Rotation(whole.ranges[0].turn.cos[:12], whole.ranges[0].turn.sin[:12]),
        together=True,
    )
    part = Step(
        [SlotRows(whole.slots[0].key[:, :12].clone(), whole.slots[0].value[:, :12].clone())],
        [few],
        whole.lens[:12],
        *(x[:, :12] for x in (whole.query, whole.key, whole.value)),
    )
    for one, other in zip(whole.native(), part.native(), strict=True):
        assert torch.equal(one[:, :12], other)


def test_rows_of_the_result_are_dense_over_all_heads():
    (found, _) = step_of(3, [], ratio=4).native()
    assert found.transpose(0, 1).is_contiguous()


def test_it_is_not_had_for_what_it_cannot_read():
    step = step_of(3, [(20, (0, 1), False, True)])
    assert span_kernels(step.slots, step.ranges) is not None
    (each,) = step.ranges
    odd = [SlotRows(step.slots[0].key[..., :30], step.slots[0].value)]
    assert span_kernels(odd, step.ranges) is None, "tokens are not dense"
    (narrow,) = step_of(3, [], head_dim=6).slots
    assert span_kernels([narrow], []) is None, "no vector is filled"
    half = SpanRange(each.key.half(), each.value.half(), each.rows, None, together=True)
    assert span_kernels(step.slots, [half]) is None
    lying = SpanRange(each.key.mT.contiguous().mT, each.value, each.rows, None, together=True)
    assert span_kernels(step.slots, [lying]) is None
    with torch_kernels_only():
        assert span_kernels(step.slots, step.ranges) is None


def test_every_part_has_a_place_of_its_own_and_every_row_finds_its_parts(monkeypatch):
    monkeypatch.setattr(items, "_MIN_KEYS_PER_CUT", 8)
    step = step_of(9, SOME, ratio=3)
    found = items.StepItems(len(step.lens), step.ranges, 2, 3, 16, 4, slots=step.slots)
    tables = found.tables()
    places = [int(first) + g * int(step_) for first, step_ in tables.entries.tolist() for g in range(3)]
    assert sorted(places) == list(range(found.num_parts))
    readers = [1 + sum(row in each.rows for each in step.ranges) for row in range(9)]
    assert all(count >= least for count, least in zip(tables.starts.diff().tolist(), readers, strict=True))
    costs = [item.cost for item in found.items]
    assert costs == sorted(costs, reverse=True)


def test_items_and_slots_are_told_in_the_order_that_kernels_read_them_in():
    step = step_of(9, SOME, ratio=3)
    found = items.StepItems(len(step.lens), step.ranges, 2, 3, 16, 4, slots=step.slots)
    tables = found.tables()
    told = [[getattr(item, name) for name in ITEM] for item in found.items]
    assert tables.items.tolist() == told
    lines = [
        {
            "key": each.key[:, row].data_ptr(),
            "key_layer": each.key.stride(0),
            "key_head": each.key.stride(2),
            "value": each.value[:, row].data_ptr(),
            "value_layer": each.value.stride(0),
            "value_head": each.value.stride(2),
            "num_keys": 0,
        }
        for each in step.slots
        for row in range(each.num_rows)
    ]
    assert tables.slots.tolist() == [[line[name] for name in SLOT] for line in lines]
