"""The merge of parts of which each row has its own: one gather and one product, however the parts overlap."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spolia_kernels.merge.reference import merge_ref
from spolia_kernels.partial import Partial


class RowParts:
    """Which rows of parts that stand side by side each row merges, looked up once for all layers of a step.

    Every row has at least one part, and none is empty: what `merge` gives, in fewer operations.
    """

    def __init__(self, parts_of_row: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> None:
        """`parts_of_row[r]` are the parts of row r, at least one."""
        most = max(map(len, parts_of_row))
        padded = torch.tensor([[*parts, *[-1] * (most - len(parts))] for parts in parts_of_row], device=device)
        self._index = padded.clamp_min(0).flatten()
        self._hidden = torch.zeros(padded.shape, device=device).masked_fill_(padded < 0, float("-inf"))

    def merge(self, parts: Partial) -> Tensor:
        """`out` [num_q_heads, num_rows, v_dim] of parts [num_q_heads, num_parts, …]."""
        heads, (num_rows, most) = parts.out.shape[0], self._hidden.shape
        lse = parts.lse.index_select(1, self._index).view(heads, num_rows, most) + self._hidden
        outs = parts.out.index_select(1, self._index).view(heads, num_rows, most, -1)
        return (torch.softmax(lse, -1)[:, :, None] @ outs)[:, :, 0]


def merge_rows_ref(parts: Partial, parts_of_row: Sequence[Sequence[int]]) -> Tensor:
    """Computes `RowParts.merge` row by row with `merge_ref`."""
    rows = [
        merge_ref([Partial(parts.out[:, p : p + 1], parts.lse[:, p : p + 1]) for p in chosen])
        for chosen in parts_of_row
    ]
    return torch.cat([row.out for row in rows], 1)
