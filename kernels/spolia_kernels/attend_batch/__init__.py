"""Attend batch: one decode row per sequence, each over its own private tail.

CPU, K and V of one width, all of one dtype, last dimension dense: `cpu.py`, which calls the fused kernel for neighbours
of like length together. CPU otherwise, CUDA and all else: the reference, a product with a length mask. A Triton path
has its room here.
"""

from __future__ import annotations

from torch import Tensor

from spolia_kernels.attend_batch.cpu import attend_batch_cpu
from spolia_kernels.attend_batch.lens import BatchLens
from spolia_kernels.attend_batch.reference import attend_batch_ref
from spolia_kernels.attend_batch.tail_keys import TailKeys
from spolia_kernels.partial import Partial

__all__ = ["BatchLens", "TailKeys", "attend_batch", "attend_batch_ref"]


def attend_batch(query: Tensor, key: Tensor, value: Tensor, lens: BatchLens, *, sm_scale: float) -> Partial:
    """Returns one partial; its row b is sequence b's decode row over its first n_b = `lens.lens[b]` keys.

        s_bj = sm_scale * (q_b . k_bj) for j < n_b
        lse_b = log sum_j e^(s_bj);   out_b = sum_j e^(s_bj - lse_b) v_bj

    Shapes: query [batch, num_q_heads, head_dim]; key [batch, num_kv_heads, max_keys, head_dim]; value [batch,
    num_kv_heads, max_keys, v_dim]; lengths 0..max_keys, where 0 gives an empty row. The partial has `out` [num_q_heads,
    batch, v_dim] and `lse` [num_q_heads, batch]: the batch is its rows, so it merges with the partials of shared spans.
    GQA, dtypes and strides as in `attend`. No input is changed. What lies past a sequence's length never counts, but
    may be read: it must be numbers that keys and values could be, zero for one, up to the longest.

    Raises ValueError where shapes or dtypes do not fit or a length exceeds max_keys.

    Source: Hydragen (arXiv 2402.05099) §3.1, attention over the unique suffixes.
    """
    _check(query, key, value, lens)
    if query.device.type == "cpu":
        return attend_batch_cpu(query, key, value, lens, sm_scale=sm_scale)
    return attend_batch_ref(query, key, value, lens.lens, sm_scale=sm_scale)


def _check(query: Tensor, key: Tensor, value: Tensor, lens: BatchLens) -> None:
    """Raises ValueError unless the arguments fit together."""
    if query.ndim != 3 or key.ndim != 4 or value.ndim != 4:
        raise ValueError(f"query, key, value have 3, 4, 4 dimensions; got {query.ndim}, {key.ndim}, {value.ndim}")
    batch, num_q_heads, head_dim = query.shape
    num_kv_heads, max_keys = key.shape[1:3]
    if key.shape[0] != batch or key.shape[3] != head_dim or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"shapes do not agree: query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    if num_kv_heads == 0 or num_q_heads % num_kv_heads:
        raise ValueError(f"num_q_heads {num_q_heads} is not a multiple of num_kv_heads {num_kv_heads}")
    if lens.lens.shape[0] != batch:
        raise ValueError(f"lens of {lens.lens.shape[0]} sequences, query of {batch}")
    if lens.longest > max_keys:
        raise ValueError(f"lens up to {lens.longest}, key holds {max_keys}")
