"""Rows of a pass over ranges and over themselves, by machine code, against attention row by row."""

from __future__ import annotations

import pytest
import torch
from kernel_worlds import poisoned
from torch import Tensor

from spolia_kernels import (
    Heads,
    Kernels,
    RotaryTable,
    Rotation,
    SpanPass,
    SpanRange,
    attend,
    kernels,
    pass_kernels,
    torch_kernels_only,
)
from spolia_kernels.attend.reference import attend_ref
from spolia_kernels.merge.reference import merge_ref

pytestmark = pytest.mark.skipif(not isinstance(kernels(), Kernels), reason="no machine code on this machine")

LAYERS, SCALE = 2, 0.3
HEADS = {
    "no GQA": Heads(4, 4, 32, 32),
    "GQA": Heads(6, 2, 16, 16),
    "one KV head": Heads(7, 1, 64, 64),
    "values of another width": Heads(2, 2, 32, 16),
}
SEEN = [(90, 0, 13), (1, 0, 0), (700, 5, 200), (33, 40, 7)]
"""Keys of each range, the first row that sees it, and how far away it stands."""


def ranges_of(heads: Heads, num_rows: int, seen: list[tuple[int, int, int]]) -> list[SpanRange]:
    table = RotaryTable(torch.rand(heads.head_dim // 2), head_dim=heads.head_dim, max_position=512)
    found = []
    for num_keys, first_row, offset in seen:
        memory = [
            poisoned(torch.randn(LAYERS, heads.num_kv_heads, num_keys, width))
            for width in (heads.head_dim, heads.v_dim)
        ]
        turn = Rotation.to(torch.tensor([-offset]), table) if offset else None
        if first_row < num_rows:
            found.append(SpanRange(*memory, tuple(range(first_row, num_rows)), turn, True))
    return found


def rows_of(heads: Heads, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """As a projection gives them: heads of a row side by side."""
    query, key, value = (
        torch.randn(num_rows, num_heads, width).transpose(0, 1)
        for num_heads, width in (
            (heads.num_q_heads, heads.head_dim),
            (heads.num_kv_heads, heads.head_dim),
            (heads.num_kv_heads, heads.v_dim),
        )
    )
    return query, key, value


def expected(ranges: list[SpanRange], layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    rows = []
    for row in range(query.shape[1]):
        q = query[:, row : row + 1]
        parts = [attend_ref(q, key[:, : row + 1], value[:, : row + 1], sm_scale=SCALE)]
        for each in ranges:
            if row in each.rows:
                turned = q if each.turn is None else each.turn(q)
                parts.append(attend_ref(turned, each.key[layer], each.value[layer], sm_scale=SCALE))
        rows.append(merge_ref(parts).out)
    return torch.cat(rows, 1)


@pytest.mark.parametrize("num_rows", [1, 2, 31, 32, 33, 100])
@pytest.mark.parametrize("shape", HEADS)
def test_rows_see_ranges_and_those_before_them(shape: str, num_rows: int) -> None:
    torch.manual_seed(num_rows)
    heads = HEADS[shape]
    ranges, rows = ranges_of(heads, num_rows, SEEN), rows_of(heads, num_rows)
    here = pass_kernels(rows[0], heads, ranges)
    assert here is not None
    found = SpanPass(here, heads, ranges, num_rows, sees_itself=True)
    for layer in range(LAYERS):
        want = expected(ranges, layer, *rows)
        torch.testing.assert_close(found.attend(layer, *rows, SCALE), want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(found.attend(0, *rows, SCALE), expected(ranges, 0, *rows), atol=2e-5, rtol=2e-5)


def test_rows_alone_see_each_other() -> None:
    torch.manual_seed(0)
    heads = HEADS["GQA"]
    rows = rows_of(heads, 200)
    here = pass_kernels(rows[0], heads, [])
    assert here is not None
    found = SpanPass(here, heads, [], 200, sees_itself=True).attend(0, *rows, SCALE)
    torch.testing.assert_close(found, expected([], 0, *rows), atol=2e-5, rtol=2e-5)


def test_rows_may_lie_elsewhere_in_every_layer() -> None:
    torch.manual_seed(1)
    heads = HEADS["no GQA"]
    ranges, rows = ranges_of(heads, 70, SEEN), rows_of(heads, 70)
    here = pass_kernels(rows[0], heads, ranges)
    assert here is not None
    found = SpanPass(here, heads, ranges, 70, sees_itself=True)
    first = found.attend(0, *rows, SCALE)
    dense = tuple(x.contiguous() for x in rows)
    torch.testing.assert_close(found.attend(0, *dense, SCALE), first, atol=0, rtol=0)
    turned = tuple(x.mT.contiguous().mT for x in rows)  # not dense in the last dimension
    torch.testing.assert_close(found.attend(0, *turned, SCALE), first, atol=0, rtol=0)


@pytest.mark.parametrize("num_rows", [1, 40])
@pytest.mark.parametrize("shape", HEADS)
def test_what_rows_saw_before_is_counted(shape: str, num_rows: int) -> None:
    torch.manual_seed(2)
    heads = HEADS[shape]
    ranges, (query, key, value) = ranges_of(heads, num_rows, SEEN), rows_of(heads, num_rows)
    here = pass_kernels(query, heads, ranges)
    assert here is not None
    found = SpanPass(here, heads, ranges, num_rows, sees_itself=False)
    with torch_kernels_only():
        own = attend(query, key, value, sm_scale=SCALE, causal=True)
    for layer in range(LAYERS):
        want = expected(ranges, layer, query, key, value)
        torch.testing.assert_close(found.beside(own, layer, query, SCALE), want, atol=2e-5, rtol=2e-5)


def test_there_is_none_for_what_kernels_do_not_take() -> None:
    heads = HEADS["GQA"]
    ranges, (query, _, _) = ranges_of(heads, 4, SEEN), rows_of(heads, 4)
    assert pass_kernels(query, heads, ranges) is not None
    assert pass_kernels(query.bfloat16(), heads, ranges) is None
    assert pass_kernels(query[:, :0], heads, ranges) is None
    odd = Heads(2, 2, 6, 6)
    assert pass_kernels(rows_of(odd, 4)[0], odd, ranges_of(odd, 4, SEEN)) is None
    with torch_kernels_only():
        assert pass_kernels(query, heads, ranges) is None


def test_parts_that_would_take_much_memory_are_left_to_ranges_one_by_one() -> None:
    heads = Heads(64, 8, 128, 128)
    query = torch.empty(64, 1, 128).expand(64, 600, 128)
    memory = torch.zeros(1, 8, 1, 128)
    one = SpanRange(memory, memory, tuple(range(600)), None, True)
    assert pass_kernels(query, heads, [one]) is not None
    assert pass_kernels(query, heads, [one] * 4) is None
