"""Inputs, oracles and comparisons shared by the kernel tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import settings
from torch import Tensor

from spolia_kernels import Partial

LAWFUL = settings(derandomize=True, deadline=None, max_examples=40, database=None)

GQA_RATIOS = (1, 2, 3, 4, 7, 8)
ODD_SIZES = (1, 63, 100, 127, 128, 129)
FLOAT32_ERROR = 1e-5


@dataclass(frozen=True, slots=True)
class Problem:
    """One attention problem; every tensor is a view inside a larger buffer of NaNs."""

    query: Tensor  # [num_q_heads, num_rows, head_dim]
    key: Tensor  # [num_kv_heads, num_keys, head_dim]
    value: Tensor  # [num_kv_heads, num_keys, v_dim]
    sm_scale: float


def problem(
    num_rows: int,
    num_keys: int,
    *,
    num_kv_heads: int = 2,
    ratio: int = 2,
    head_dim: int = 16,
    v_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return poisoned(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype))

    return Problem(
        query=drawn(num_kv_heads * ratio, num_rows, head_dim),
        key=drawn(num_kv_heads, num_keys, head_dim),
        value=drawn(num_kv_heads, num_keys, head_dim if v_dim is None else v_dim),
        sm_scale=head_dim**-0.5,
    )


def poisoned(x: Tensor) -> Tensor:
    """Returns `x` as a view with a dense last dimension, inside a larger buffer whose other elements are NaN."""
    buffer = torch.full([size + 5 for size in x.shape], float("nan"), dtype=x.dtype)
    view = buffer[tuple(slice(2, 2 + size) for size in x.shape)]
    view.copy_(x)
    return view


def oracle(query: Tensor, key: Tensor, value: Tensor, *, sm_scale: float, causal: bool = False) -> Partial:
    """Attention row by row and head by head in float64: slow, and sharing no line with the kernels."""
    num_q_heads, num_rows, _ = query.shape
    num_kv_heads, num_keys, v_dim = value.shape
    out = torch.zeros(num_q_heads, num_rows, v_dim, dtype=torch.float64)
    lse = torch.full((num_q_heads, num_rows), float("-inf"), dtype=torch.float64)
    for head in range(num_q_heads):
        kv_head = head * num_kv_heads // num_q_heads
        keys, values = key[kv_head].double(), value[kv_head].double()
        for row in range(num_rows):
            visible = max(0, row + 1 + num_keys - num_rows) if causal else num_keys
            if visible == 0:
                continue
            scores = keys[:visible] @ query[head, row].double() * sm_scale
            out[head, row] = torch.softmax(scores, dim=0) @ values[:visible]
            lse[head, row] = scores.max() + (scores - scores.max()).exp().sum().log()
    return Partial(out, lse)


def some_partial(num_q_heads: int, num_rows: int, v_dim: int, *, seed: int, share_empty: float = 0.3) -> Partial:
    """Returns a float32 partial with LSEs of very different sizes, some of its rows empty."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(num_q_heads, num_rows, v_dim, generator=generator)
    lse = torch.randn(num_q_heads, num_rows, generator=generator) * 20
    empty = torch.rand(num_q_heads, num_rows, generator=generator) < share_empty
    return Partial(out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, float("-inf")))


def assert_same(got: Partial, wanted: Partial, error: float = FLOAT32_ERROR, *, lse_error: float | None = None) -> None:
    """Fails unless shapes agree, nothing is NaN, the same rows are empty (and zero), and the rest differ by < error."""
    assert got.out.shape == wanted.out.shape
    assert got.lse.shape == wanted.lse.shape
    assert not got.out.isnan().any()
    assert not got.lse.isnan().any()
    empty = wanted.lse == float("-inf")
    assert torch.equal(got.lse == float("-inf"), empty)
    assert (got.out[empty] == 0).all()
    assert largest(got.out.double() - wanted.out.double()) < error
    assert largest(got.lse.double()[~empty] - wanted.lse.double()[~empty]) < (error if lse_error is None else lse_error)


def largest(x: Tensor) -> float:
    """Returns the largest magnitude in `x`, 0 when it holds nothing."""
    return float(x.abs().max()) if x.numel() else 0.0
