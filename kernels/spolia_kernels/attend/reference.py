"""Attention over one set of keys, in the words of its definition."""

from __future__ import annotations

import torch
from torch import Tensor

from spolia_kernels.attend.shapes import AttendShape
from spolia_kernels.partial import Partial
from spolia_kernels.precision import compute_dtype


def attend_ref(query: Tensor, key: Tensor, value: Tensor, *, sm_scale: float, causal: bool = False) -> Partial:
    """Computes `attend` with two matrix products and a softmax; see there for shapes and meaning.

        s = sm_scale * q k^T  (-inf where not visible);  lse = logsumexp(s);  out = exp(s - lse) v

    Computes in float32, or float64 when `query` is float64. Holds all scores at once:
    num_q_heads * num_rows * num_keys numbers. Runs on every device.
    """
    shape = AttendShape.of(query, key, value)
    dtype = compute_dtype(query.dtype)
    # Rows of one GQA group are stacked, so that no key is repeated: [num_kv_heads, group_size * num_rows,
    # head_dim].
    grouped = query.to(dtype).reshape(shape.num_kv_heads, shape.group_size * shape.num_rows, shape.head_dim)
    scores = (grouped @ key.to(dtype).mT) * sm_scale
    scores = scores.reshape(shape.num_q_heads, shape.num_rows, shape.num_keys)
    if causal:
        row = torch.arange(shape.num_rows, device=query.device)[:, None]
        column = torch.arange(shape.num_keys, device=query.device)[None, :]
        scores = scores.masked_fill(column > row + (shape.num_keys - shape.num_rows), float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    # exp(-inf - -inf) is NaN: a row that sees nothing subtracts 0 instead and gets weights exp(-inf) = 0.
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    stacked = weights.reshape(shape.num_kv_heads, shape.group_size * shape.num_rows, shape.num_keys)
    out = (stacked @ value.to(dtype)).reshape(shape.num_q_heads, shape.num_rows, shape.v_dim)
    return Partial(out, lse)
