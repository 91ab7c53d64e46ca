"""Linear: rows times a weight matrix that is laid out once for the device.

CPU, float32, oneDNN present: packed by `onednn.py`. A decode step has few rows, so a product is as fast as the weights
are read, and torch's own layout, [num_out, num_in], is read badly. 512 → 4096, weights from memory, float32, 2 threads,
ms of MKL plain, transposed, and packed: 1 row 0.71, 0.41, 0.40; 4 rows 1.5, 1.6, 0.53; 32 rows 1.8, 1.6, 1.2. Many rows
lose nothing: 1024 rows 16.6 plain, 12.8 packed. CPU otherwise: plain, as weight · xᵀ up to 64 rows, which MKL does as
fast as the packed product from 2 to 4 rows (0.52) and a fifth slower at 32. CUDA and all else: plain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spolia_kernels.linear.onednn import can_pack, pack, packed_linear
from spolia_kernels.linear.reference import linear_ref

__all__ = ["Linear", "linear_ref"]

_FEW_ROWS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """y = x Wᵀ + b, W in a layout of this device. Made by `of`. Compared by identity."""

    weight: Tensor
    bias: Tensor | None
    is_packed: bool

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None, *, shared: bool = False) -> Linear:
        """Lays out a weight [num_out, num_in], with bias [num_out].

        A packed weight is a copy; `weight` is not kept. `shared`: it stays in memory as it is for another use (an
        embedding table), so no second copy is made of it.
        """
        bias = None if bias is None else bias.detach()
        if shared or not can_pack(weight):
            return cls(weight.detach(), bias, False)
        return cls(pack(weight), bias, True)

    def __call__(self, x: Tensor) -> Tensor:
        """x [num_rows, num_in] to [num_rows, num_out], in x's dtype; strides of the result are free."""
        if self.is_packed:
            return packed_linear(x, self.weight, self.bias)
        if x.device.type == "cpu" and 0 < x.shape[0] <= _FEW_ROWS:
            # One row goes twice: MKL multiplies by two columns faster than by one.
            rows = x if x.shape[0] > 1 else x.expand(2, -1).contiguous()
            out = (self.weight @ rows.mT).mT[: x.shape[0]]
            return out if self.bias is None else out + self.bias
        return torch.nn.functional.linear(x, self.weight, self.bias)
