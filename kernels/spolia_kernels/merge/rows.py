"""The merge of parts of which each row has its own: one gather and one product, however the parts overlap."""

from __future__ import annotations

import torch
from torch import Tensor

from spolia_kernels.indices import check_indices
from spolia_kernels.merge.reference import merge_ref, merge_weights
from spolia_kernels.partial import Partial


def merge_rows(parts: Partial, parts_of_row: Tensor) -> Partial:
    """Row r of the result merges the rows `parts_of_row[r]` of `parts`, -1 naming none.

    parts: `out` [num_q_heads, num_parts, v_dim], `lse` [num_q_heads, num_parts], partials of whatever rows side by
    side, left unchanged; parts_of_row int64 [num_rows, max_parts], -1 padding shorter lists. A row without any part is
    empty: (0, -inf). Formula and laws as in `merge`.

    Raises ValueError where shapes or dtypes do not fit, IndexError for a part there is not (on CUDA the device's own
    assertion).
    """
    if parts_of_row.ndim != 2:
        raise ValueError(f"parts_of_row is [num_rows, max_parts]; got {tuple(parts_of_row.shape)}")
    num_parts = parts.lse.shape[1]
    check_indices(parts_of_row.flatten() + 1, num_parts + 1, "parts_of_row")
    num_rows, max_parts = parts_of_row.shape
    index, none = parts_of_row.clamp_min(0).flatten(), parts_of_row < 0
    lse = parts.lse.index_select(1, index).view(-1, num_rows, max_parts).masked_fill(none, float("-inf"))
    weights, merged_lse = merge_weights(lse.movedim(-1, 0))
    outs = parts.out.index_select(1, index).view(parts.out.shape[0], num_rows, max_parts, -1)
    weights = weights.movedim(0, -1)
    unseen = weights == 0.0
    if bool(unseen.any()):  # an empty part's `out` may hold anything
        outs = outs.masked_fill(unseen[..., None], 0.0)
    return Partial((weights[:, :, None] @ outs)[:, :, 0], merged_lse)


def merge_rows_ref(parts: Partial, parts_of_row: Tensor) -> Partial:
    """Computes `merge_rows` row by row with `merge_ref`."""
    heads, _, v_dim = parts.out.shape
    rows = []
    for chosen in parts_of_row.tolist():
        named = [Partial(parts.out[:, p : p + 1], parts.lse[:, p : p + 1]) for p in chosen if p >= 0]
        empty = Partial.empty(heads, 1, v_dim, dtype=parts.lse.dtype, device=parts.lse.device)
        rows.append(merge_ref([empty, *named]))
    return Partial(torch.cat([r.out for r in rows], 1), torch.cat([r.lse for r in rows], 1))
