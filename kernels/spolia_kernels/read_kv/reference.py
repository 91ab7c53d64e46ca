"""Gathering keys and values out of a pool."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class KeyValue:
    """Keys and values of the same tokens. Compared by identity."""

    key: Tensor  # [num_kv_heads, num_tokens, head_dim]
    value: Tensor  # [num_kv_heads, num_tokens, v_dim]


def read_kv_ref(key_pool: Tensor, value_pool: Tensor, slots: Tensor) -> KeyValue:
    """Computes `read_kv`; see there for shapes and meaning."""
    return KeyValue(key_pool.index_select(1, slots), value_pool.index_select(1, slots))
