"""The partial: what attention over some of the keys leaves behind, ready to be merged with the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Partial:
    """Attention of some query rows over one set S of keys.

        lse = log sum_{j in S} exp(s_j)          s_j = sm_scale * (q . k_j), natural logarithm
        out = sum_{j in S} exp(s_j - lse) v_j

    A row that saw no key is *empty*: `out` 0 and `lse` -inf, the neutral element of `merge`. Both tensors are
    float32, or float64 when they were computed from float64 inputs. Compared by identity.
    """

    out: Tensor  # [num_q_heads, num_rows, v_dim]
    lse: Tensor  # [num_q_heads, num_rows]

    @classmethod
    def empty(
        cls,
        num_q_heads: int,
        num_rows: int,
        v_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Partial:
        """Returns the neutral element: every row empty. `dtype` is float32 or float64."""
        return cls(
            out=torch.zeros(num_q_heads, num_rows, v_dim, dtype=dtype, device=device),
            lse=torch.full((num_q_heads, num_rows), float("-inf"), dtype=dtype, device=device),
        )
