"""Append KV: writes new tokens' keys and values into pool slots.

One path on every device, `reference.py`, behind checks that read the slot mapping; on CUDA they wait for the
device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spolia_kernels.append_kv.reference import append_kv_ref

__all__ = ["append_kv", "append_kv_ref"]


def append_kv(key_pool: Tensor, value_pool: Tensor, slot_mapping: Tensor, key: Tensor, value: Tensor) -> None:
    """Writes token t's key and value into slot `slot_mapping[t]` of the pools, in place; -1 skips the token.

        key_pool[h, slot_mapping[t]] = key[h, t];   value_pool[h, slot_mapping[t]] = value[h, t]

    key_pool [num_kv_heads, num_slots, head_dim] and value_pool [num_kv_heads, num_slots, v_dim] (views are
    fine); slot_mapping int64 [num_tokens], distinct but for -1; key [num_kv_heads, num_tokens, head_dim] and
    value [num_kv_heads, num_tokens, v_dim], converted to the pools' dtypes. Slots not named keep their bits.

    Raises IndexError for a slot below -1 or past the pool, ValueError for a slot named twice or for shapes or
    dtypes that do not fit; the pools are unchanged then.

    Source: the slot mapping of PagedAttention (arXiv 2309.06180) §4.
    """
    _check_shapes(key_pool, value_pool, slot_mapping, key, value)
    _check_slots(slot_mapping, key_pool.shape[1])
    append_kv_ref(key_pool, value_pool, slot_mapping, key, value)


def _check_shapes(key_pool: Tensor, value_pool: Tensor, slot_mapping: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises ValueError unless pools, mapping and new tokens fit together."""
    if slot_mapping.ndim != 1 or slot_mapping.dtype != torch.int64:
        raise ValueError(f"slot_mapping is a 1-d int64 tensor; got {slot_mapping.ndim}-d {slot_mapping.dtype}")
    if key_pool.ndim != 3 or value_pool.ndim != 3 or key_pool.shape[:2] != value_pool.shape[:2]:
        raise ValueError(f"pools of unequal shapes: {tuple(key_pool.shape)} and {tuple(value_pool.shape)}")
    for name, pool, new in (("key", key_pool, key), ("value", value_pool, value)):
        wanted = (pool.shape[0], slot_mapping.shape[0], pool.shape[2])
        if tuple(new.shape) != wanted:
            raise ValueError(f"{name} is {wanted} for this pool and slot_mapping; got {tuple(new.shape)}")


def _check_slots(slot_mapping: Tensor, num_slots: int) -> None:
    """Raises IndexError for a slot outside -1..num_slots-1, ValueError for one named twice."""
    if slot_mapping.shape[0] == 0:
        return
    ordered = slot_mapping.sort().values
    low, high = int(ordered[0]), int(ordered[-1])
    if low < -1 or high >= num_slots:
        raise IndexError(f"slot {low if low < -1 else high} outside -1..{num_slots - 1}")
    repeated = (ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)
    if bool(repeated.any()):
        raise ValueError(f"slot {int(ordered[1:][repeated][0])} is named twice")
