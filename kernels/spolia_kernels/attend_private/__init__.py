"""Attend private: decode rows that name the same keys, each reading them for itself.

What a system does that shares memory between sequences but not attention; `attend` does the same with all rows in one
product. CPU: our own machine code, or the fused kernel, the rows a batch whose keys are one view repeated, so nothing
is copied. CUDA and all else: the reference.
"""

from __future__ import annotations

from torch import Tensor

from spolia_kernels.attend.flash_cpu import fits_flash, flash
from spolia_kernels.attend.native_cpu import attend_private_native, native_for
from spolia_kernels.attend.shapes import AttendShape
from spolia_kernels.attend_private.reference import attend_private_ref
from spolia_kernels.partial import Partial

__all__ = ["attend_private", "attend_private_ref"]


def attend_private(query: Tensor, key: Tensor, value: Tensor, *, sm_scale: float) -> Partial:
    """Equals `attend(query, key, value)`; see there for shapes and meaning. At least one row.

    The rows of one GQA group are stacked under their KV head, so a row reads its keys once. Raises ValueError where the
    shapes do not agree.
    """
    shape = AttendShape.of(query, key, value)
    if (here := native_for(query, key, value)) is not None:
        return attend_private_native(here, query, key, value, sm_scale=sm_scale)
    rows, heads, group = shape.num_rows, shape.num_kv_heads, shape.group_size
    stacked = query.transpose(0, 1).reshape(rows, heads, group, shape.head_dim)
    if not fits_flash(stacked, key, value):
        return attend_private_ref(query, key, value, sm_scale=sm_scale)
    each = (rows, -1, -1, -1)
    out, lse = flash(stacked, key[None].expand(each), value[None].expand(each), sm_scale=sm_scale)
    out = out.reshape(rows, shape.num_q_heads, shape.v_dim).transpose(0, 1)
    return Partial(out, lse.reshape(rows, shape.num_q_heads).t())
