"""Read KV: gathers tokens' keys and values out of pool slots.

One path on every device, `reference.py`: a gather is a memory copy, and torch's is one.
"""

from __future__ import annotations

from torch import Tensor

from spolia_kernels.indices import check_indices
from spolia_kernels.read_kv.reference import KeyValue, read_kv_ref

__all__ = ["KeyValue", "read_kv", "read_kv_ref"]


def read_kv(key_pool: Tensor, value_pool: Tensor, slots: Tensor) -> KeyValue:
    """Returns copies of the keys and values in `slots`, in that order; a slot may be named more than once.

        key[h, t] = key_pool[h, slots[t]];   value[h, t] = value_pool[h, slots[t]]

    key_pool [num_kv_heads, num_slots, head_dim], value_pool [num_kv_heads, num_slots, v_dim], left unchanged
    (views are fine); slots int64 [num_tokens], non-negative. Keeps the pools' dtypes. Raises IndexError for a
    slot the pool does not have (on CUDA the device's own assertion), ValueError where shapes or dtypes do not fit.

    Source: the block-table gather of PagedAttention (arXiv 2309.06180) §4.
    """
    if key_pool.ndim != 3 or value_pool.ndim != 3 or key_pool.shape[:2] != value_pool.shape[:2]:
        raise ValueError(f"pools of unequal shapes: {tuple(key_pool.shape)} and {tuple(value_pool.shape)}")
    check_indices(slots, key_pool.shape[1], "slots")
    return read_kv_ref(key_pool, value_pool, slots)
