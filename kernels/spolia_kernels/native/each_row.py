"""Kernels that take rows by themselves (`rows_ir.py`), as torch's tensors are handed to them.

Each function returns None where it cannot be had: another device or dtype, no machine code, widths that no vector
fills. torch's own operations do the same then.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from spolia_kernels.native.kernels import Kernels, kernels, row_kernel

_ALONE = 1 << 15
"""Numbers up to which the caller's thread computes by itself: another one's share is not worth waking it."""
_ITEMS_PER_THREAD = 4


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """weight · x / sqrt(mean(x²) + eps) of x [num_rows, width] or [outer, inner, width], weight [width]."""
    if x.dim() not in (2, 3) or weight.shape != x.shape[-1:]:
        return None
    found = _kernels_for(x.shape[-1], x, weight)
    if found is None:
        return None
    here, lanes = found
    width = x.shape[-1]
    inner, x_inner = (1, 0) if x.dim() == 2 else (x.shape[1], x.stride(1))
    out = x.new_empty(*x.shape)
    fields = (
        width,
        _bits(1.0 / width),
        _bits(eps),
        *(x.data_ptr(), inner, x.stride(0), x_inner),
        weight.data_ptr(),
        out.data_ptr(),
    )
    _run(here, "rms_norm", lanes, x.numel() // width, width, fields)
    return out


def silu_mul(gate_up: Tensor) -> Tensor | None:
    """silu(gate) · up of `gate_up` [num_rows, 2 · width], gate in the first half of a row; [num_rows, width]."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    found = _kernels_for(width, gate_up)
    if found is None:
        return None
    here, lanes = found
    out = gate_up.new_empty(num_rows, width)
    gate = gate_up.data_ptr()
    fields = (width, gate, gate + width * gate_up.element_size(), gate_up.stride(0), out.data_ptr())
    _run(here, "silu_mul", lanes, num_rows, 4 * width, fields)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """x [num_heads, num_rows, head_dim] by the angles of `cos` and `sin`, [num_rows or 1, half] and dense alike:
    [num_heads, num_rows, head_dim], whose rows are dense over all heads.
    """
    num_heads, num_rows, head_dim = x.shape
    half = cos.shape[1]
    if cos.shape != sin.shape or cos.shape[0] not in (1, num_rows) or head_dim < 2 * half:
        return None
    found = _kernels_for(half, x, cos, sin)
    if found is None:
        return None
    here, lanes = found
    if (head_dim - 2 * half) % lanes:
        return None
    out = x.new_empty(num_rows, num_heads, head_dim)
    fields = (
        *(num_heads, head_dim),
        *(x.data_ptr(), x.stride(0), x.stride(1)),
        *(cos.data_ptr(), sin.data_ptr(), half if cos.shape[0] > 1 else 0, half),
        out.data_ptr(),
    )
    _run(here, "rotate", lanes, num_rows, num_heads * head_dim, fields)
    return out.transpose(0, 1)


def _kernels_for(width: int, x: Tensor, *others: Tensor) -> tuple[Kernels, int] | None:
    """The kernels and a vector that fills `width`; `others` are dense."""
    if x.device.type != "cpu" or x.numel() == 0 or x.stride(-1) != 1 or x.dtype != torch.float32:
        return None
    if not all(other.dtype == torch.float32 and other.is_contiguous() for other in others):
        return None
    here = kernels()
    if not isinstance(here, Kernels):
        return None
    lanes = here.lanes_for(width)
    return None if lanes is None else (here, lanes)


def _run(here: Kernels, name: str, lanes: int, num_rows: int, row_work: int, fields: tuple[int, ...]) -> None:
    kernel = row_kernel(name, lanes)
    if num_rows * row_work <= _ALONE:
        here.run_alone(kernel, (num_rows, num_rows, *fields))
        return
    item_rows = -(-num_rows // (_ITEMS_PER_THREAD * torch.get_num_threads()))
    here.run(kernel, here.lanes, -(-num_rows // item_rows), 0, 1.0, (num_rows, item_rows, *fields))


def _bits(number: float) -> int:
    bits: int = struct.unpack("<i", struct.pack("<f", number))[0]
    return bits
