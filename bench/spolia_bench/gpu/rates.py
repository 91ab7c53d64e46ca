"""What the device can do: the two rates every floor is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from spolia_bench.gpu.batches import DEVICE
from spolia_bench.gpu.timing import figures, timed


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes and operations per second."""

    copy: float
    """Bytes read and written by a copy, both counted."""
    matrix: float
    """bfloat16 products, 8192 × 8192 × 8192, random numbers."""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """From what `measured` gives."""
        return cls(1e12 * row["copy_tb_per_s"], 1e12 * row["matrix_tflop_per_s"])

    def floor_ms(self, num_bytes: float, num_flops: float) -> float:
        """The longer of the two, for one operator."""
        return 1e3 * max(num_bytes / self.copy, num_flops / self.matrix)


def measured(*, numbers: int = 2 << 30, size: int = 8192) -> Iterator[dict[str, Any]]:
    """The only row of a section, from which `Rates.of` makes them. Takes about a second and 12 GB."""
    source = torch.empty(numbers, dtype=torch.bfloat16, device=DEVICE).normal_()
    target = torch.empty_like(source)
    copies = timed(lambda: target.copy_(source), repeats=10)
    left, right = (torch.randn(size, size, device=DEVICE).to(torch.bfloat16) for _ in range(2))
    products = timed(lambda: left @ right, repeats=20)
    yield {
        "copy_tb_per_s": 2 * source.nbytes / copies.median_ms / 1e9,
        "matrix_tflop_per_s": 2 * size**3 / products.median_ms / 1e9,
        **figures("copy", copies),
        **figures("matrix", products),
    }
