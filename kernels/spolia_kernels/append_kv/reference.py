"""Writing keys and values of new tokens into a pool."""

from __future__ import annotations

from torch import Tensor


def append_kv_ref(key_pool: Tensor, value_pool: Tensor, slot_mapping: Tensor, key: Tensor, value: Tensor) -> None:
    """Computes `append_kv` for arguments already checked; see there for shapes and meaning."""
    written = slot_mapping >= 0
    slots = slot_mapping[written]
    key_pool.index_copy_(1, slots, key[:, written].to(key_pool.dtype))
    value_pool.index_copy_(1, slots, value[:, written].to(value_pool.dtype))
