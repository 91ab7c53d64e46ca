"""Decode rows that each read the same keys for themselves, in the words of its definition."""

from __future__ import annotations

import torch
from torch import Tensor

from spolia_kernels.attend.reference import attend_ref
from spolia_kernels.partial import Partial


def attend_private_ref(query: Tensor, key: Tensor, value: Tensor, *, sm_scale: float) -> Partial:
    """Computes `attend_private` row by row; see there for shapes and meaning."""
    parts = [attend_ref(query[:, row : row + 1], key, value, sm_scale=sm_scale) for row in range(query.shape[1])]
    return Partial(torch.cat([part.out for part in parts], 1), torch.cat([part.lse for part in parts], 1))
