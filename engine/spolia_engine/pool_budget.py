"""How many blocks a budget of bytes is, and whether the device has it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spolia_core.errors import InvalidRequest
from spolia_engine.pool import DEFAULT_BLOCK_SIZE
from spolia_engine.slot_memory import DEVICE_BLOCK_SIZE

RESERVED_BYTES = 3 << 29
"""Of a device, beside weights, pool and the buffers of steps: a prompt's pass, libraries and code. By arithmetic, not
measured: a row of a pass of Llama-3-8B's shape in 16 bits takes 164 KB at once (hidden states and norm 16, queries to
values 12, gate, up and their product 86, three partials of its attention in float32 49), so 1 GiB is some 6,500 rows,
two dozen slices; half a GiB is left for kernels' code and the workspaces of libraries."""


@dataclass(frozen=True, slots=True)
class PoolBudget:
    """A pool's size."""

    num_blocks: int
    block_size: int


def pool_budget(
    pool_bytes: int,
    block_size: int | None,
    bytes_per_token: int,
    *,
    on_device: bool,
    free_bytes: int | None = None,
    step_bytes: int = 0,
) -> PoolBudget:
    """Blocks of `block_size` tokens (None: what suits the device) that `pool_bytes` hold; at least one.

    `free_bytes`: what the device has left; `step_bytes`: what the buffers of its steps will take. Raises
    `InvalidRequest` for a budget that leaves it no `RESERVED_BYTES` beside these.
    """
    reserved = RESERVED_BYTES + step_bytes
    size = block_size or (DEVICE_BLOCK_SIZE if on_device else DEFAULT_BLOCK_SIZE)
    if free_bytes is not None and pool_bytes > free_bytes - reserved:
        most = max(0, free_bytes - reserved)
        raise InvalidRequest(
            f"pool_bytes is {pool_bytes}, and {most} are left on the device beside the model and {reserved} "
            "for what steps need",
            field="pool_bytes",
            limit=f"≤ {most}",
            actual=str(pool_bytes),
        )
    return PoolBudget(max(1, pool_bytes // (bytes_per_token * size)), size)


def free_bytes(device: torch.device) -> int | None:
    """Memory that is left on a CUDA device; None elsewhere, where memory is taken as it is used."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
