"""Linear: rows times a weight matrix that is laid out once for the device.

CPU, float32, oneDNN present: packed by `onednn.py`. A decode step has few rows, so a product is as fast as the weights
are read, and torch's own layout, [num_out, num_in], is read badly by some processors. 512 → 4096, weights from memory,
2 threads, ms plain, transposed, and packed, AMD EPYC: 1 row 0.71, 0.41, 0.40; 4 rows 1.5, 1.6, 0.53; 32 rows 1.8, 1.6,
1.2; 1,024 rows 16.6 plain, 12.8 packed. Intel Xeon: 1 row 0.35, 0.31, 0.47; 4 rows 0.60, 0.45, 0.48; 32 rows 1.2, 0.99,
0.91. CPU otherwise: plain, few rows in the order that was measured to be faster (`few_rows.py`). CUDA and all else:
plain.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import linear

from spolia_kernels.linear.few_rows import NOT_MEASURED, FewRows, measured_few_rows
from spolia_kernels.linear.onednn import can_pack, pack, packed_linear, packed_linear_added
from spolia_kernels.linear.reference import linear_ref

__all__ = ["NOT_MEASURED", "FewRows", "Linear", "linear_ref", "measured_few_rows"]


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """y = x Wᵀ + b, W in a layout of this device. Made by `of`. Compared by identity."""

    weight: Tensor
    bias: Tensor | None
    is_packed: bool
    few_rows: FewRows

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor | None = None, *, shared: bool = False, few_rows: FewRows = NOT_MEASURED
    ) -> Linear:
        """Lays out a weight [num_out, num_in], with bias [num_out].

        A packed weight is a copy; `weight` is not kept. `shared`: it stays in memory as it is for another use (an
        embedding table), so no second copy is made of it.
        """
        bias = None if bias is None else bias.detach()
        if shared or not can_pack(weight):
            return cls(weight.detach(), bias, False, few_rows)
        return cls(pack(weight), bias, True, few_rows)

    def __call__(self, x: Tensor) -> Tensor:
        """x [num_rows, num_in] to [num_rows, num_out], in x's dtype; strides of the result are free."""
        if self.is_packed:
            return packed_linear(x, self.weight, self.bias)
        if x.device.type == "cpu":
            out = self.few_rows.product(x, self.weight)
            return out if self.bias is None else out + self.bias
        return linear(x, self.weight, self.bias)

    def added_to(self, base: Tensor, x: Tensor) -> Tensor:
        """`base` + y of x, in one pass where it is packed; `base` [num_rows, num_out] is left unchanged."""
        if self.is_packed and self.bias is None:
            return packed_linear_added(base, x, self.weight)
        return base + self(x)
