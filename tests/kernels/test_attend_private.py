"""Rows that read the same keys one by one see what they see together."""

from __future__ import annotations

import pytest
import torch
from kernel_worlds import GQA_RATIOS, ODD_SIZES, assert_same, oracle, problem

from spolia_kernels import attend, attend_private
from spolia_kernels.attend_private import attend_private_ref


@pytest.mark.parametrize("ratio", GQA_RATIOS)
@pytest.mark.parametrize("num_keys", ODD_SIZES)
@pytest.mark.parametrize("function", [attend_private, attend_private_ref, attend])
def test_equals_the_oracle(function, num_keys, ratio):
    world = problem(5, num_keys, ratio=ratio, seed=num_keys)
    got = function(world.query, world.key, world.value, sm_scale=world.sm_scale)
    assert_same(got, oracle(world.query, world.key, world.value, sm_scale=world.sm_scale))


def test_unequal_widths_and_no_keys():
    for num_keys, v_dim in ((9, 5), (0, 16)):
        world = problem(3, num_keys, v_dim=v_dim)
        got = attend_private(world.query, world.key, world.value, sm_scale=0.3)
        assert_same(got, oracle(world.query, world.key, world.value, sm_scale=0.3))


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_16_bits(dtype, error):
    world = problem(4, 100, head_dim=64, dtype=dtype)
    got = attend_private(world.query, world.key, world.value, sm_scale=0.125)
    assert got.out.dtype == torch.float32
    assert_same(got, oracle(world.query, world.key, world.value, sm_scale=0.125), error)


def test_shapes_that_do_not_agree_are_refused():
    world = problem(4, 10)
    with pytest.raises(ValueError, match="head_dim"):
        attend_private(world.query[..., :8], world.key, world.value, sm_scale=1.0)
