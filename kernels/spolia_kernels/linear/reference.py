"""A product with a weight matrix, in the words of its definition."""

from __future__ import annotations

from torch import Tensor


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes `Linear.__call__` from the plain weight [num_out, num_in]; see there."""
    out = x @ weight.mT
    return out if bias is None else out + bias
