"""How many blocks a budget of bytes is, and whether the device has it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spolia_core.errors import InvalidRequest
from spolia_engine.pool import DEFAULT_BLOCK_SIZE
from spolia_engine.slot_memory import DEVICE_BLOCK_SIZE

RESERVED_BYTES = 2 << 30
"""Of a device, beside weights and pool: steps' buffers, their graphs, a prompt's hidden states. Not measured yet."""


@dataclass(frozen=True, slots=True)
class PoolBudget:
    """A pool's size."""

    num_blocks: int
    block_size: int


def pool_budget(
    pool_bytes: int, block_size: int | None, bytes_per_token: int, *, on_device: bool, free_bytes: int | None = None
) -> PoolBudget:
    """Blocks of `block_size` tokens (None: what suits the device) that `pool_bytes` hold; at least one.

    `free_bytes`: what the device has left. Raises `InvalidRequest` for a budget that leaves it no `RESERVED_BYTES`.
    """
    size = block_size or (DEVICE_BLOCK_SIZE if on_device else DEFAULT_BLOCK_SIZE)
    if free_bytes is not None and pool_bytes > free_bytes - RESERVED_BYTES:
        most = max(0, free_bytes - RESERVED_BYTES)
        raise InvalidRequest(
            f"pool_bytes is {pool_bytes}, and {most} are left on the device beside the model and {RESERVED_BYTES} "
            "for what steps need",
            field="pool_bytes",
            limit=f"≤ {most}",
            actual=str(pool_bytes),
        )
    return PoolBudget(max(1, pool_bytes // (bytes_per_token * size)), size)


def free_bytes(device: torch.device) -> int | None:
    """Memory that is left on a CUDA device; None elsewhere, where memory is taken as it is used."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
