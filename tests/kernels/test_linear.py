"""Products with weights in a layout of their own equal the plain product, at every number of rows."""

from __future__ import annotations

import pytest
import torch

from spolia_kernels import Linear
from spolia_kernels.linear import linear_ref
from spolia_kernels.linear.onednn import can_pack

ROWS = [1, 2, 3, 31, 64, 65, 200]
SIZES = [(1, 1), (63, 65), (64, 100), (512, 258)]


def weights(num_in: int, num_out: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_in * 1000 + num_out)
    weight = torch.randn(num_out, num_in, generator=generator) / num_in**0.5
    return weight.to(dtype), torch.randn(num_out, generator=generator).to(dtype)


@torch.inference_mode()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_float32_equals_the_reference(size: tuple[int, int], num_rows: int, shared: bool, has_bias: bool) -> None:
    weight, bias = weights(*size, torch.float32)
    own_bias = bias if has_bias else None
    x = torch.randn(num_rows, size[0], generator=torch.Generator().manual_seed(num_rows))
    got = Linear.of(weight, own_bias, shared=shared)(x)
    expected = linear_ref(x.double(), weight.double(), own_bias.double() if own_bias is not None else None)
    assert got.shape == (num_rows, size[1])
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [1, 3, 65])
def test_16_bit_weights_stay_plain(dtype: torch.dtype, num_rows: int) -> None:
    weight, bias = weights(64, 100, dtype)
    linear = Linear.of(weight, bias)
    assert not linear.is_packed
    assert linear.weight.data_ptr() == weight.data_ptr()
    x = torch.randn(num_rows, 64).to(dtype)
    expected = linear_ref(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(linear(x).double(), expected, atol=0.05, rtol=0.02)


@torch.inference_mode()
def test_rows_that_are_views_are_read_as_they_lie() -> None:
    weight, _ = weights(64, 100, torch.float32)
    x = torch.randn(5, 128)[:, 32:96]
    for shared in (False, True):
        torch.testing.assert_close(Linear.of(weight, shared=shared)(x), x @ weight.mT)


def test_a_weight_that_stays_elsewhere_is_not_copied() -> None:
    weight, _ = weights(64, 100, torch.float32)
    assert Linear.of(weight, shared=True).weight.data_ptr() == weight.data_ptr()


def test_packing_is_for_float32_on_a_cpu_with_onednn() -> None:
    weight, _ = weights(64, 100, torch.float32)
    assert can_pack(weight) == torch.backends.mkldnn.is_available()
    assert Linear.of(weight).is_packed == can_pack(weight)
    assert not can_pack(weight.double())
    assert not can_pack(torch.empty(0, 64))
