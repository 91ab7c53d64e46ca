"""Products with weights in a layout of their own equal the plain product, at every number of rows."""

from __future__ import annotations

import pytest
import torch

from spolia_kernels import NOT_MEASURED, FewRows, Linear, measured_few_rows
from spolia_kernels.linear import few_rows as few
from spolia_kernels.linear import linear_ref
from spolia_kernels.linear.onednn import can_pack

ROWS = [1, 2, 3, 31, 64, 65, 200]
SOME_FIRST = FewRows(frozenset({1, 4, 64}))
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
@pytest.mark.parametrize("few_rows", [NOT_MEASURED, SOME_FIRST], ids=["unmeasured", "measured"])
def test_float32_equals_the_reference(
    size: tuple[int, int], num_rows: int, shared: bool, has_bias: bool, few_rows: FewRows
) -> None:
    weight, bias = weights(*size, torch.float32)
    own_bias = bias if has_bias else None
    x = torch.randn(num_rows, size[0], generator=torch.Generator().manual_seed(num_rows))
    got = Linear.of(weight, own_bias, shared=shared, few_rows=few_rows)(x)
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


def test_the_order_is_chosen_by_rows_up_to_a_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, chosen = torch.randn(5, 4), []
    for name in ("rows_first", "weight_first"):
        real = getattr(few, name)
        monkeypatch.setattr(few, name, lambda x, w, n=name, r=real: (chosen.append(n), r(x, w))[1])
    rows = [0, 1, 2, 3, 4, 5, 33, 64, 65]
    for num_rows in rows:
        x = torch.randn(num_rows, 4)
        torch.testing.assert_close(SOME_FIRST.product(x, weight), x @ weight.mT)
    assert [n for n, name in zip(rows, chosen, strict=True) if name == "rows_first"] == [0, 1, 3, 4, 33, 64, 65]


def test_the_faster_order_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(weights: list[torch.Tensor], product: object, num_rows: int) -> float:
        return 1.0 if (product is few.rows_first) == (num_rows < 8) else 2.0

    monkeypatch.setattr(few, "_NUM_WEIGHTS", 1)
    assert measured_few_rows.__wrapped__().rows_first <= {1, 2, 4, 8, 16, 32, 64}
    monkeypatch.setattr(few, "_seconds", seconds)
    assert measured_few_rows.__wrapped__() == FewRows(frozenset({1, 2, 4}))


@torch.inference_mode()
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("num_rows", [1, 32, 65])
def test_a_sum_with_a_product_is_their_sum(num_rows: int, shared: bool, has_bias: bool) -> None:
    weight, bias = weights(64, 100, torch.float32)
    linear = Linear.of(weight, bias if has_bias else None, shared=shared)
    x, base = torch.randn(num_rows, 64), torch.randn(num_rows, 100)
    before = base.clone()
    torch.testing.assert_close(linear.added_to(base, x), base + linear(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(base, before)
