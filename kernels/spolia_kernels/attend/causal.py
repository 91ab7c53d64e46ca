"""Bottom-right causal attention out of what fused kernels know: all keys, and a square."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from spolia_kernels.merge import merge, merge_into
from spolia_kernels.partial import Partial
from spolia_kernels.precision import compute_dtype

Attend = Callable[[Tensor, Tensor, Tensor, float], Partial]
"""Of query, key, value and sm_scale."""


def attend_causal(
    query: Tensor, key: Tensor, value: Tensor, sm_scale: float, *, square: Attend, over_all: Attend
) -> Partial:
    """Keys that every row sees, a square, and rows that see nothing.

    `square`: row i of n sees keys 0..i of n. `over_all`: every row sees every key.
    """
    num_q_heads, num_rows, _ = query.shape
    num_keys = key.shape[1]
    if num_keys < num_rows:
        dtype = compute_dtype(query.dtype)
        result = Partial.empty(num_q_heads, num_rows, value.shape[2], dtype=dtype, device=query.device)
        seeing = slice(num_rows - num_keys, num_rows)
        merge_into(result, square(query[:, seeing], key, value, sm_scale), seeing)
        return result
    seen_by_all = num_keys - num_rows
    own = square(query, key[:, seen_by_all:], value[:, seen_by_all:], sm_scale)
    if seen_by_all == 0:
        return own
    return merge([over_all(query, key[:, :seen_by_all], value[:, :seen_by_all], sm_scale), own])
