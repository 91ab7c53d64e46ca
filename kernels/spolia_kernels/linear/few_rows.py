"""Few rows times a weight that must stay as torch lays it out: as x Wᵀ or as W xᵀ, as this processor does it faster.

They do not agree. 512 → 4096, float32, weights from memory, two threads, ms as x Wᵀ and as W xᵀ: one row 0.71 and 0.52
on an AMD EPYC, 0.35 and 0.70 on an Intel Xeon; 32 rows 1.8 and 1.4, 1.2 and 0.85.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

_NUM_IN, _NUM_OUT, _NUM_WEIGHTS = 512, 4096, 16
"""128 MiB: more than a cache keeps beside what else a step reads."""
_NUM_ROUNDS = 3
_ROWS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class FewRows:
    """`rows_first`: of `_ROWS`, those up to which x Wᵀ is the faster one. Of more rows it always is."""

    rows_first: frozenset[int] = frozenset()

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x Wᵀ of x [num_rows, num_in] and a weight [num_out, num_in]; strides of the result are free."""
        bucket = 1 << max(0, x.shape[0] - 1).bit_length()
        if x.shape[0] == 0 or bucket > _ROWS[-1] or bucket in self.rows_first:
            return rows_first(x, weight)
        return weight_first(x, weight)


NOT_MEASURED = FewRows()
"""For weights that fit a cache: the choice hardly shows there, and measuring would cost more."""


@cache
def measured_few_rows() -> FewRows:
    """Measures once a process, with torch's number of threads at that time: half a second on two cores."""
    weights = [torch.ones(_NUM_OUT, _NUM_IN) for _ in range(_NUM_WEIGHTS)]
    with torch.inference_mode():
        return FewRows(
            frozenset(
                rows for rows in _ROWS if _seconds(weights, rows_first, rows) < _seconds(weights, weight_first, rows)
            )
        )


def rows_first(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ as it stands."""
    return x @ weight.mT


def weight_first(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ as (W xᵀ)ᵀ; at least one row."""
    # One row goes twice: MKL multiplies by two columns faster than by one.
    rows = x if x.shape[0] > 1 else x.expand(2, -1).contiguous()
    return (weight @ rows.mT).mT[: x.shape[0]]


def _seconds(weights: list[Tensor], product: Callable[[Tensor, Tensor], Tensor], num_rows: int) -> float:
    """Of all weights once, the least of some rounds: what else runs here only adds."""
    x = torch.ones(num_rows, _NUM_IN)
    found = []
    for _ in range(_NUM_ROUNDS):
        started = time.perf_counter()
        for weight in weights:
            product(x, weight)
        found.append(time.perf_counter() - started)
    return min(found)
