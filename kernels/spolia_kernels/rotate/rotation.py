"""A rotation of rows, looked up once and applied in every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from spolia_kernels.native import each_row
from spolia_kernels.rotate.table import RotaryTable

# Numbers up to which `y = x · (cos, cos) + swap(x) · (-sin, sin)` is taken, in three calls, rather than each half by
# itself, in five. 16 heads of 64, float32, 2 threads, us by halves and swapped: 1 row 19, 6; 32 rows 37, 20; 256 rows
# 266, 870.
_FEW = 1 << 16


class Rotation:
    """Row i turned by the angles of `cos[i]` and `sin[i]`, [num_rows, rotary_dim / 2] each; one row turns all alike."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        self.sin = sin
        self._both_cos = torch.cat((cos, cos), -1)
        self._both_sin = torch.cat((-sin, sin), -1)

    @classmethod
    def to(cls, positions: Tensor, table: RotaryTable, scale: float = 1.0) -> Rotation:
        """To integer positions of any sign, int64 [num_rows]. `scale` is a model's temperature (YaRN); pure without."""
        cos, sin = table.cos_sin(positions)
        return cls(cos, sin) if scale == 1.0 else cls(cos * scale, sin * scale)

    def row(self, index: int) -> Rotation:
        """That of one row, for any number of them."""
        return Rotation(self.cos[index : index + 1], self.sin[index : index + 1])

    def __call__(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Computes `rotate` of x [num_heads, num_rows, head_dim], or of its rows `rows`, int64, that may repeat.

        x is left unchanged; strides of the result are free.
        """
        half = self.cos.shape[-1]
        if rows is not None:
            x = x.index_select(1, rows)
        found = each_row.rotate(x, self.cos, self.sin)
        if found is not None:
            return found
        if x.numel() > _FEW or x.shape[2] != 2 * half or x.dtype != self.cos.dtype:
            return self._by_halves(x)
        return (x * self._both_cos).addcmul_(torch.roll(x, half, -1), self._both_sin)

    def of_groups(self, x: Tensor) -> Tensor:
        """All rows of x [num_heads, num_rows, head_dim] turned several times, row r in group g by the angles of row
        g · num_rows + r: [num_groups, num_heads, num_rows, head_dim], a view of any strides but the last.

        What `__call__` gives for rows 0, 1, 2, …, 0, 1, 2, …, without gathering: 8 groups of 32 rows, 8 heads of 64,
        float32, 2 threads, cold: 182 → 89 us.
        """
        half, num_rows = self.cos.shape[-1], x.shape[1]
        groups = self.cos.shape[0] // num_rows
        if x.shape[2] != 2 * half or x.dtype != self.cos.dtype:
            return self._by_halves(x.repeat(1, groups, 1)).view(x.shape[0], groups, num_rows, -1).transpose(0, 1)
        size = (groups, num_rows, 2 * half)
        swapped = torch.roll(x, half, -1)[:, None]
        turned = (x[:, None] * self._both_cos.view(size)).addcmul_(swapped, self._both_sin.view(size))
        return turned.transpose(0, 1)

    def _by_halves(self, x: Tensor) -> Tensor:
        cos, sin, half = self.cos, self.sin, self.cos.shape[-1]
        source = x if x.dtype == cos.dtype else x.to(cos.dtype)
        first, second = source[..., :half], source[..., half : 2 * half]
        out = torch.empty(x.shape, dtype=cos.dtype, device=x.device)
        torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1.0)
        torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
        out[..., 2 * half :] = source[..., 2 * half :]
        return out.to(x.dtype)
