"""Machine code that takes rows by themselves, against torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spolia_kernels import Kernels, Rotation, kernels, torch_kernels_only
from spolia_kernels.fused import RmsNorm, silu_mul
from spolia_kernels.fused.reference import silu_mul_ref
from spolia_kernels.native import each_row

pytestmark = pytest.mark.skipif(not isinstance(kernels(), Kernels), reason="no machine code on this machine")
WIDTHS = (4, 24, 64, 512, 1364)
ROWS = (1, 3, 32, 700)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("num_rows", ROWS)
def test_norm_of_rows(num_rows: int, width: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(num_rows, width) * 30, torch.randn(width)
    found = each_row.rms_norm(x, weight, 1e-5)
    assert found is not None
    torch.testing.assert_close(found, torch.nn.functional.rms_norm(x, (width,), weight, 1e-5), atol=1e-5, rtol=1e-5)
    assert torch.equal(found[-1:], RmsNorm.of(weight, 1e-5)(x[-1:])), "whatever is computed beside it"


def test_norm_of_heads_that_stand_among_others() -> None:
    torch.manual_seed(1)
    heads, weight = torch.randn(40, 9, 16), torch.randn(16)
    some = heads[:, 2:7]
    found = each_row.rms_norm(some, weight, 1e-6)
    assert found is not None
    assert found.is_contiguous()
    torch.testing.assert_close(found, torch.nn.functional.rms_norm(some, (16,), weight, 1e-6), atol=1e-6, rtol=1e-6)


def test_norm_keeps_tiny_rows_and_what_is_no_number() -> None:
    weight = torch.ones(16)
    x = torch.stack((torch.zeros(16), torch.full((16,), 1e-30), torch.full((16,), math.nan), torch.ones(16)))
    found = each_row.rms_norm(x, weight, 1e-5)
    assert found is not None
    assert not found[0].any()
    assert found[2].isnan().all()
    torch.testing.assert_close(found[3], torch.ones(16), atol=1e-5, rtol=0)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("num_rows", ROWS)
def test_gate_times_up(num_rows: int, width: int) -> None:
    torch.manual_seed(2)
    gate_up = torch.randn(num_rows, 2 * width) * 10
    found = each_row.silu_mul(gate_up)
    assert found is not None
    torch.testing.assert_close(found, silu_mul_ref(gate_up), atol=1e-6, rtol=1e-6)


def test_gates_of_any_size() -> None:
    gates = [
        -math.inf,
        -3e38,
        -1e4,
        -88.0,
        -87.0,
        -20.0,
        -1e-30,
        0.0,
        1e-30,
        5.0,
        88.0,
        1e4,
        3e38,
        math.inf,
        math.nan,
        1.0,
    ]
    gate_up = torch.cat((torch.tensor([gates]), torch.ones(1, 16)), 1)
    found, expected = each_row.silu_mul(gate_up), silu_mul_ref(gate_up)
    assert found is not None
    assert found[0, 0] == 0, "torch says that it is no number"
    torch.testing.assert_close(found[0, 1:], expected[0, 1:], atol=1e-34, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("head_dim", [8, 64, 96])
@pytest.mark.parametrize("num_rows", ROWS)
def test_rotation_of_heads(num_rows: int, head_dim: int) -> None:
    torch.manual_seed(3)
    x = torch.randn(num_rows, 6, head_dim)[:, :5].transpose(0, 1)
    before = x.clone()
    turn = _turn(num_rows, head_dim // 2)
    found = each_row.rotate(x, turn.cos, turn.sin)
    assert found is not None
    with torch_kernels_only():
        expected = turn(x)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(x, before)
    assert torch.equal(turn(x), found), "which is what a rotation is"


def test_one_rotation_turns_all_rows_and_leaves_dimensions_behind_the_halves() -> None:
    x, turn = torch.randn(3, 20, 48), _turn(1, 16)
    found = each_row.rotate(x, turn.cos, turn.sin)
    with torch_kernels_only():
        expected = turn(x)
    assert found is not None
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(found[..., 32:], x[..., 32:])


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(0, 16),
        torch.zeros(4, 16, dtype=torch.bfloat16),
        torch.zeros(4, 18),
        torch.zeros(16, 4).mT,
        torch.zeros(16),
    ],
    ids=["empty", "16 bits", "no vector fills it", "not dense", "one dimension"],
)
def test_what_it_cannot_take_is_left_to_torch(x: Tensor) -> None:
    weight = torch.ones(x.shape[-1], dtype=x.dtype)
    assert each_row.rms_norm(x, weight, 1e-5) is None
    assert RmsNorm.of(weight, 1e-5)(x).shape == x.shape
    if x.dim() == 2:
        assert each_row.silu_mul(x) is None or x.shape[1] == 18
        assert silu_mul(x).shape == (x.shape[0], x.shape[1] // 2)


def test_shapes_that_disagree_are_left_to_torch_which_refuses_them() -> None:
    assert each_row.rms_norm(torch.ones(2, 16), torch.ones(8), 1e-5) is None
    turn = _turn(3, 8)
    assert each_row.rotate(torch.ones(1, 2, 16), turn.cos, turn.sin) is None
    with pytest.raises(RuntimeError):
        turn(torch.ones(1, 2, 16))


def _turn(num_rows: int, half: int) -> Rotation:
    angles = torch.randn(num_rows, half)
    return Rotation(angles.cos(), angles.sin())
