"""Merge: joins partials over disjoint sets of keys into the partial over their union.

CPU: `cpu.py`, which reads every part once. CUDA and all else: `reference.py`. A Triton path has its room
here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spolia_kernels.indices import check_indices
from spolia_kernels.merge.cpu import merge_cpu, merge_into_cpu
from spolia_kernels.merge.reference import merge_ref
from spolia_kernels.merge.rows import RowParts, merge_rows_ref
from spolia_kernels.partial import Partial

__all__ = ["RowParts", "merge", "merge_into", "merge_ref", "merge_rows_ref", "merge_seen"]


def merge(partials: Sequence[Partial]) -> Partial:
    """Returns the partial over the union of the parts' key sets, which must be disjoint.

        merge((o1,l1),(o2,l2)) = ( (o1·e^(l1-m) + o2·e^(l2-m)) / (e^(l1-m)+e^(l2-m)),
                                   m + log(e^(l1-m)+e^(l2-m)) )                         m = max(l1, l2)

    and the same for n parts, which are left unchanged. Associative and commutative up to rounding. Empty rows
    (`lse` -inf) are neutral whatever their `out` holds, and a row that is empty in every part comes back as
    (0, -inf), never NaN.

    Shapes: `out` [num_q_heads, num_rows, v_dim], `lse` [num_q_heads, num_rows], equal in all parts, as are
    dtype and device. Raises ValueError for an empty sequence, unequal shapes or unequal dtypes.

    Source: Hydragen (arXiv 2402.05099) §3.1; the rescaling is that of FlashAttention (arXiv 2205.14135) §3.1.
    """
    if not partials:
        raise ValueError("merge needs at least one partial: the merge of none has no shape")
    for part in partials:
        _check_matches(partials[0], part)
    return merge_cpu(partials) if partials[0].out.device.type == "cpu" else merge_ref(partials)


def merge_seen(partials: Sequence[Partial]) -> Tensor:
    """Returns `merge(partials).out` where no row is empty in any part, in fewer operations.

    Every `lse` is finite: a decode step's parts, each of which has a key for every one of its rows.
    """
    if len(partials) == 2:
        first, second = partials
        return torch.lerp(first.out, second.out, torch.sigmoid(second.lse - first.lse)[..., None])
    weights = torch.softmax(torch.stack([part.lse for part in partials]), 0)[..., None]
    merged = partials[0].out * weights[0]
    for part, weight in zip(partials[1:], weights[1:], strict=True):
        merged.addcmul_(part.out, weight)
    return merged


def merge_into(acc: Partial, part: Partial, rows: slice | Tensor | None = None) -> None:
    """Merges `part` into some rows of `acc`, in place: the form for a span that only those rows see.

    `rows` is None (all rows), a slice, or an int64 tensor [num_part_rows] of distinct row indices; row r of
    `part` joins row `rows[r]` of `acc`. Indices that repeat are the caller's error and are not looked for:
    one of the repeated rows would be lost. Rows not named keep their bits. Formula and laws as in `merge`.

    Raises ValueError when shapes or dtypes do not fit, IndexError for a row that `acc` does not have; `acc`
    is unchanged then.
    """
    if isinstance(rows, Tensor):
        check_indices(rows, acc.lse.shape[1], "rows")
        joined = merge([Partial(acc.out.index_select(1, rows), acc.lse.index_select(1, rows)), part])
        acc.out.index_copy_(1, rows, joined.out)
        acc.lse.index_copy_(1, rows, joined.lse)
        return
    chosen = slice(None) if rows is None else rows
    view = Partial(acc.out[:, chosen], acc.lse[:, chosen])
    _check_matches(view, part)
    if acc.out.device.type == "cpu":
        merge_into_cpu(view, part)
        return
    joined = merge_ref([view, part])
    view.out.copy_(joined.out)
    view.lse.copy_(joined.lse)


def _check_matches(first: Partial, other: Partial) -> None:
    """Raises ValueError unless two partials can be merged."""
    if first.out.shape != other.out.shape or first.lse.shape != other.lse.shape:
        raise ValueError(
            f"partials of unequal shapes: out {tuple(first.out.shape)} and {tuple(other.out.shape)}, "
            f"lse {tuple(first.lse.shape)} and {tuple(other.lse.shape)}"
        )
    if first.out.dtype != other.out.dtype:
        raise ValueError(f"partials of unequal dtypes: {first.out.dtype} and {other.out.dtype}")
