"""Cosines and sines of rotary angles by integer position."""

from __future__ import annotations

import torch
from torch import Tensor


class RotaryTable:
    """Cosines and sines of position * inv_freq, for every integer position, negative ones included.

    A pure rotation: no attention scaling enters, so offsets of stored keys can be undone exactly. Angles are
    computed in float64 and their cosines and sines stored in float32, for positions 0..max_position; a larger
    position grows the table (by doubling), and a negative one flips the sign of the sine. Growth replaces the
    tensors and never changes an entry, so threads may read while one grows. On CUDA every lookup waits for
    the device, to know how far to grow.
    """

    def __init__(
        self,
        inv_freq: Tensor,
        *,
        head_dim: int,
        max_position: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Fills the table for 0..max_position.

        `inv_freq` [rotary_dim / 2], radians per position, any float dtype: frequencies that do not depend on
        the length (plain, linear, llama3, YaRN). The first `rotary_dim` of `head_dim` dimensions rotate.
        Raises ValueError when rotary_dim exceeds head_dim or max_position is negative.
        """
        if inv_freq.ndim != 1 or not 0 < 2 * inv_freq.shape[0] <= head_dim:
            raise ValueError(f"inv_freq of shape {tuple(inv_freq.shape)} does not fit head_dim {head_dim}")
        if max_position < 0:
            raise ValueError(f"max_position {max_position} is negative")
        self.head_dim = head_dim
        self.rotary_dim = 2 * inv_freq.shape[0]
        self.inv_freq = inv_freq.to(device=device, dtype=torch.float64)
        self._cos_sin = self._computed(max_position)

    @property
    def device(self) -> torch.device:
        """Where the table lies, and the positions must."""
        return self.inv_freq.device

    @property
    def max_position(self) -> int:
        """The largest position the table holds now."""
        return self._cos_sin[0].shape[0] - 1

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines, float32 [n, rotary_dim / 2] each, of int64 `positions` [n] of any sign.

        Raises ValueError for positions of another dtype or rank.
        """
        if positions.ndim != 1 or positions.dtype != torch.int64:
            raise ValueError(f"positions is a 1-d int64 tensor; got {positions.ndim}-d {positions.dtype}")
        if positions.shape[0] == 0:
            none = torch.empty(0, self.rotary_dim // 2, device=positions.device)
            return none, none.clone()
        low, high = (int(bound) for bound in torch.aminmax(positions))
        cos, sin = self._cos_sin if max(high, -low) <= self.max_position else self._grown(max(high, -low))
        if low >= 0:
            return cos.index_select(0, positions), sin.index_select(0, positions)
        distance = positions.abs()
        sign = torch.sign(positions).to(sin.dtype)[:, None]
        return cos.index_select(0, distance), sin.index_select(0, distance) * sign

    def _grown(self, position: int) -> tuple[Tensor, Tensor]:
        """Grows the table until it holds `position` and returns it."""
        size = self.max_position + 1
        while size <= position:
            size *= 2
        grown = self._computed(size - 1)
        if grown[0].shape[0] > self._cos_sin[0].shape[0]:  # another thread may have grown it further
            self._cos_sin = grown
        return grown

    def _computed(self, max_position: int) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines, each float32 [max_position + 1, rotary_dim / 2]."""
        positions = torch.arange(max_position + 1, dtype=torch.float64, device=self.device)
        angles = torch.outer(positions, self.inv_freq)
        return angles.cos().to(torch.float32), angles.sin().to(torch.float32)
