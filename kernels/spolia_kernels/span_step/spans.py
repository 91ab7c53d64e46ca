"""What the rows of a step read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spolia_kernels.rotate import Rotation


@dataclass(frozen=True, slots=True)
class Heads:
    """How many there are and how wide they are."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    v_dim: int

    @property
    def group_size(self) -> int:
        """Query heads of a KV head."""
        return self.num_q_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True, eq=False)
class SlotRows:
    """Neighbouring rows over what each reads alone, in every layer.

    `key` [num_layers, num_rows, num_kv_heads, capacity, head_dim], `value` the same with v_dim; tokens are dense.
    """

    key: Tensor
    value: Tensor

    @property
    def num_rows(self) -> int:
        """Rows, which follow those of the slots before."""
        return self.key.shape[1]


@dataclass(frozen=True, slots=True, eq=False)
class SpanRange:
    """A range of keys in every layer and the rows that read it.

    `key` [num_layers, num_kv_heads, num_keys, head_dim], `value` the same with v_dim, dense in the last dimension.
    `turn` has a row for each of `rows`, in their order, or one for all: from where they stand to where the range does;
    None for nothing.
    `together`: the rows attend it in one product; else each reads it for itself.
    """

    key: Tensor
    value: Tensor
    rows: tuple[int, ...]
    turn: Rotation | None
    together: bool
