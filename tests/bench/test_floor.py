"""The floor: what is counted, and what it adds up to."""

from __future__ import annotations

import pytest

from spolia_bench.model_shape import ModelShape
from spolia_bench.reuse.floor import Kind, Operator, Rates, floor_of, seconds_of
from spolia_bench.reuse.machine import linked_pass
from spolia_bench.reuse.operators import Pass, Seen, operators_of, prefill_pass

SHAPE = ModelShape(layers=2, width=8, mlp=16, num_q_heads=4, num_kv_heads=2, head_dim=2, vocab=10)


def operations(work: Pass, *kinds: Kind) -> int:
    return sum(o.operations * o.count for o in operators_of(work, SHAPE) if o.kind in kinds)


def test_an_operator_takes_the_longer_of_its_bytes_and_its_operations() -> None:
    computing = Operator("m", Kind.MATMUL, (1, 1, 1), num_bytes=10, operations=100)
    rates = Rates({(Kind.MATMUL, (1, 1, 1)): 50.0}, {10: 2.0}, stream_bytes_per_s=10.0)
    assert seconds_of(computing, rates) == 2.0
    slow_memory = Rates(rates.operations_per_s, rates.moved_bytes_per_s, stream_bytes_per_s=1.0)
    assert seconds_of(computing, slow_memory) == 10.0


def test_bytes_take_what_their_size_was_measured_to_take() -> None:
    rates = Rates({}, {10: 2.0}, stream_bytes_per_s=1000.0)
    assert seconds_of(Operator("norm", Kind.BYTES, (10,), 10), rates) == 5.0


def test_a_floor_is_the_sum_of_its_parts_times_their_counts() -> None:
    operators = [
        Operator("m", Kind.MATMUL, (1, 1, 1), 0, operations=1, count=3),
        Operator("a", Kind.ATTENTION, (1, 1, 1, 1, 1), 0, operations=2),
        Operator("c", Kind.CAUSAL, (1, 1, 1, 1, 1), 0, operations=4),
        Operator("n", Kind.BYTES, (8,), 8),
    ]
    unit = {(o.kind, o.shape): 1.0 for o in operators}
    floor = floor_of(operators, Rates(unit, {8: 8.0}, stream_bytes_per_s=1.0))
    assert (floor.matmul_ms, floor.attention_ms, floor.other_ms) == (3000.0, 6000.0, 1000.0)
    assert floor.total_ms == 10_000.0


def test_a_shape_that_was_not_measured_has_no_floor() -> None:
    with pytest.raises(KeyError):
        floor_of([Operator("m", Kind.MATMUL, (1, 1, 1), 0, 1)], Rates({}, {}, 1.0))


def test_products_are_counted_by_the_weights_of_the_model() -> None:
    weights = 2 * (8 * 8 * 2 + 2 * 8 * 4 + 3 * 8 * 16)  # layers · (query, output; key, value; the three of the MLP)
    assert operations(prefill_pass(5), Kind.MATMUL) == 2 * (5 * weights + 8 * 10)


def test_a_prefill_attends_a_triangle() -> None:
    pairs = 5 * 6 // 2
    assert operations(prefill_pass(5), Kind.CAUSAL) == 2 * 4 * 4 * 2 * pairs


def test_a_link_pass_sees_every_pair_that_a_full_one_sees_of_its_rows() -> None:
    """Rows of R at positions p see p + 1 keys each, whether reused or recomputed with them."""
    work = linked_pass(3, 10, 4, 2)
    positions = [0, 1, 2, 11, 12, 21, 22, *range(31, 35)]
    assert work.num_rows == len(positions)
    # Link tokens of later chunks see the whole chunks before, whose first two were recomputed and the rest reused.
    pairs = sum(p + 1 for p in positions)
    assert operations(work, Kind.CAUSAL, Kind.ATTENTION) == 2 * 4 * 4 * 2 * pairs


def test_a_decode_step_is_a_pass_without_a_triangle() -> None:
    step = Pass(num_rows=3, seen=(Seen(3, 100), Seen(1, 7), Seen(1, 7), Seen(1, 9)), num_logits=3)
    assert operations(step, Kind.ATTENTION) == 2 * 4 * 4 * 2 * (300 + 7 + 7 + 9)
    assert operations(step, Kind.CAUSAL) == 0
    alike = [o for o in operators_of(step, SHAPE) if o.kind is Kind.ATTENTION and o.shape[3] == 7]
    assert [o.count for o in alike] == [2 * SHAPE.layers]


def test_keys_are_read_once_for_all_rows_and_heads_of_a_group() -> None:
    (one,) = [o for o in operators_of(Pass(3, (Seen(3, 100),)), SHAPE) if o.kind is Kind.ATTENTION]
    assert one.num_bytes == 4 * (2 * 100 * 2 * 2 + 2 * 3 * 4 * 2)
