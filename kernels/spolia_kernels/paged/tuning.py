"""How the paged kernels are cut, by what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spolia_kernels.paged.memory import PagedKv


@dataclass(frozen=True, slots=True)
class Tuning:
    """Keys of one step, warps of a program, depth of the pipeline, programs per multiprocessor."""

    keys: int
    num_warps: int
    num_stages: int
    per_processor: int = 1


def tuning(query: Tensor, kv: PagedKv, tile: int) -> Tuning:
    """For a tile of query rows. Float32 halves what fits in shared memory."""
    keys = 64 if kv.head_dim <= 128 else 32
    if query.dtype.itemsize == 4:
        return Tuning(32, 4, 2)
    if tile <= 16:
        return Tuning(keys, 4, 3, 4)
    if tile <= 64:
        return Tuning(keys, 4, 3, 2)
    return Tuning(keys, 8, 3, 1)
