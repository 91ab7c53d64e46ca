"""How the paged kernels are cut, by what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tuning:
    """Keys of one step, warps of a program, depth of the pipeline, programs per multiprocessor where they stay."""

    keys: int
    num_warps: int
    num_stages: int
    per_processor: int = 1
    joined: bool = False
    special: bool = False


def span_tuning(query: Tensor, tile: int) -> Tuning:
    """For a tile of query rows over spans. Wide numbers and heads halve what fits in shared memory."""
    if query.dtype.itemsize == 4:
        return Tuning(32, 4, 2)
    if query.shape[-1] > 128:
        return Tuning(32, 4, 2, 1)
    if tile <= 32:
        return Tuning(64, 4, 3, 2)
    return Tuning(64, 4, 3, 2) if tile <= 64 else Tuning(128, 8, 2, 1)


def tail_tuning(query: Tensor) -> Tuning:
    """For the rows' own tails."""
    return Tuning(32, 2, 2) if query.dtype.itemsize == 2 else Tuning(16, 2, 2)
