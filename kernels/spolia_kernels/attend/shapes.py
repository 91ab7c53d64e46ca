"""What every attention path may assume: shapes that fit together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttendShape:
    """Sizes of one attention problem, read off its tensors once."""

    num_q_heads: int
    num_kv_heads: int
    num_rows: int
    num_keys: int
    head_dim: int
    v_dim: int

    @property
    def group_size(self) -> int:
        """Query heads per KV head; query head h reads KV head h // group_size."""
        return self.num_q_heads // self.num_kv_heads

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor) -> AttendShape:
        """Reads the sizes off the tensors. Raises ValueError, naming both, where two do not agree."""
        if query.ndim != 3 or key.ndim != 3 or value.ndim != 3:
            raise ValueError(f"query, key and value have 3 dimensions each; got {query.ndim}, {key.ndim}, {value.ndim}")
        num_q_heads, num_rows, head_dim = query.shape
        num_kv_heads, num_keys, key_dim = key.shape
        if key_dim != head_dim:
            raise ValueError(f"query has head_dim {head_dim}, key has {key_dim}")
        if value.shape[:2] != key.shape[:2]:
            raise ValueError(
                f"key has {num_kv_heads} heads of {num_keys} keys, value {value.shape[0]} of {value.shape[1]}"
            )
        if num_kv_heads == 0 or num_q_heads % num_kv_heads:
            raise ValueError(f"num_q_heads {num_q_heads} is not a multiple of num_kv_heads {num_kv_heads}")
        return cls(num_q_heads, num_kv_heads, num_rows, num_keys, head_dim, value.shape[2])
