"""One decode row per sequence over its own keys, in the words of its definition."""

from __future__ import annotations

import torch
from torch import Tensor

from spolia_kernels.partial import Partial
from spolia_kernels.precision import compute_dtype


def attend_batch_ref(query: Tensor, key: Tensor, value: Tensor, key_lens: Tensor, *, sm_scale: float) -> Partial:
    """Computes `attend_batch` with a length mask; see there for shapes and meaning.

    Computes in float32, or float64 when `query` is float64. Memory past a length is read, but replaced before
    it can count. Runs on every device without waiting for it.
    """
    dtype = compute_dtype(query.dtype)
    batch, num_q_heads, head_dim = query.shape
    num_kv_heads, max_keys, v_dim = value.shape[1:]
    seen = torch.arange(max_keys, device=query.device) < key_lens[:, None]  # [batch, max_keys]
    grouped = query.to(dtype).reshape(batch, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    scores = (grouped @ key.to(dtype).mT) * sm_scale  # [batch, num_kv_heads, group_size, max_keys]
    scores = scores.masked_fill(~seen[:, None, None, :], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    values = value.to(dtype).masked_fill(~seen[:, None, :, None], 0.0)  # 0 * NaN is NaN
    out = (weights @ values).reshape(batch, num_q_heads, v_dim)
    return Partial(out.transpose(0, 1).contiguous(), lse.reshape(batch, num_q_heads).t().contiguous())
