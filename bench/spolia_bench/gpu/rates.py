"""What the device can do: the two rates every floor is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from spolia_bench.gpu.timing import timed


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes and operations per second."""

    copy: float
    """Bytes read and written by a copy, both counted."""
    matrix: float
    """bfloat16 products, 8192 × 8192 × 8192, random numbers."""

    def floor_ms(self, num_bytes: float, num_flops: float) -> float:
        """The longer of the two, for one operator."""
        return 1e3 * max(num_bytes / self.copy, num_flops / self.matrix)


def measured() -> Iterator[dict[str, Any]]:
    """`measure`, as the only row of a section."""
    yield asdict(measure())


def measure() -> Rates:
    """Takes about a second and 12 GB."""
    source = torch.empty(2 << 30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    copy_ms = timed(lambda: target.copy_(source), repeats=10).median_ms
    n = 8192
    left, right = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matrix_ms = timed(lambda: left @ right, repeats=20).median_ms
    return Rates(2 * source.nbytes / copy_ms * 1e3, 2 * n**3 / matrix_ms * 1e3)
