"""The dtype in which the operations compute."""

from __future__ import annotations

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns float64 for float64 and float32 for all else: nothing accumulates in 16 bits."""
    return torch.float64 if dtype == torch.float64 else torch.float32
