"""The small operations in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def add_rms_norm_ref(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Computes `add_rms_norm`; see there."""
    if delta is not None:
        hidden += delta
    wide = hidden.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(hidden.dtype)


def silu_mul_ref(gate_up: Tensor) -> Tensor:
    """Computes `silu_mul`; see there."""
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate).mul_(up)
