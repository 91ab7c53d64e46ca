"""Merges of a decode step, where every row has its own parts and none is empty, equal the merge of each row alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_worlds import LAWFUL

from spolia_kernels import Partial, RowParts, merge, merge_seen
from spolia_kernels.merge import merge_rows_ref


def parts(num_parts: int, seed: int = 0) -> Partial:
    generator = torch.Generator().manual_seed(seed)
    return Partial(
        torch.randn(3, num_parts, 4, generator=generator), 5 * torch.randn(3, num_parts, generator=generator)
    )


@LAWFUL
@given(
    rows=st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_rows_with_parts_of_their_own(rows, seed):
    world = parts(8, seed)
    torch.testing.assert_close(RowParts(rows).merge(world), merge_rows_ref(world, rows))


@pytest.mark.parametrize("num_parts", [1, 2, 3, 9])
def test_parts_of_all_rows(num_parts):
    world = [parts(5, seed) for seed in range(num_parts)]
    torch.testing.assert_close(merge_seen(world), merge(world).out)


def test_huge_sums_keep_their_weights():
    for low, high in ((1e4, 1e4 + 1), (-3e4, 3e4)):
        world = Partial(torch.randn(1, 2, 4), torch.tensor([[low, high]]))
        wanted = torch.softmax(torch.tensor([low - high, 0.0]), 0) @ world.out[0]
        torch.testing.assert_close(RowParts([[0, 1]]).merge(world)[0, 0], wanted)
        halves = [Partial(world.out[:, i : i + 1], world.lse[:, i : i + 1]) for i in range(2)]
        torch.testing.assert_close(merge_seen(halves)[0, 0], wanted)
