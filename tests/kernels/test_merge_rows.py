"""Each row's own parts, merged at once, equal the merge of that row alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_worlds import LAWFUL, assert_same

from spolia_kernels import Partial, merge_rows
from spolia_kernels.merge import merge_rows_ref


def parts(num_parts: int, *, empty: tuple[int, ...] = (), seed: int = 0) -> Partial:
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(3, num_parts, 4, generator=generator)
    lse = 5 * torch.randn(3, num_parts, generator=generator)
    for part in empty:
        lse[:, part] = float("-inf")
        out[:, part] = float("nan")
    return Partial(out, lse)


@LAWFUL
@given(
    rows=st.lists(st.lists(st.integers(-1, 7), min_size=3, max_size=3), min_size=1, max_size=6),
    empty=st.sets(st.integers(0, 7), max_size=3),
    seed=st.integers(0, 99),
)
def test_equals_row_by_row(rows, empty, seed):
    world, chosen = parts(8, empty=tuple(empty), seed=seed), torch.tensor(rows)
    assert_same(merge_rows(world, chosen), merge_rows_ref(world, chosen))


def test_a_row_without_parts_is_empty():
    got = merge_rows(parts(2), torch.tensor([[-1, -1], [0, -1]]))
    assert (got.out[:, 0] == 0).all()
    assert (got.lse[:, 0] == float("-inf")).all()
    assert torch.equal(got.out[:, 1], parts(2).out[:, 0])


def test_huge_sums_keep_their_weights():
    world = Partial(torch.randn(1, 2, 4), torch.tensor([[1e4, 1e4 + 1]]))
    got = merge_rows(world, torch.tensor([[0, 1]]))
    wanted = torch.softmax(torch.tensor([0.0, 1.0]), 0) @ world.out[0]
    torch.testing.assert_close(got.out[0, 0], wanted)


@pytest.mark.parametrize("bad", [[[2]], [[-2]]])
def test_parts_there_are_not_are_refused(bad):
    with pytest.raises(IndexError):
        merge_rows(parts(2), torch.tensor(bad))
    with pytest.raises(ValueError, match="parts_of_row"):
        merge_rows(parts(2), torch.tensor([0]))
