"""Attention on a CUDA device: FlashAttention, cut so that it is asked what it answers without doubt."""

from __future__ import annotations

from torch import Tensor

from spolia_kernels.attend.causal import attend_causal
from spolia_kernels.attend.flash_cuda import fits_flash_cuda, flash_cuda
from spolia_kernels.attend.reference import attend_ref
from spolia_kernels.attend.shapes import AttendShape
from spolia_kernels.partial import Partial
from spolia_kernels.precision import compute_dtype


def attend_cuda(query: Tensor, key: Tensor, value: Tensor, *, sm_scale: float, causal: bool = False) -> Partial:
    """Computes `attend`; the reference where FlashAttention does not take the tensors."""
    shape = AttendShape.of(query, key, value)
    if shape.num_rows == 0 or shape.num_keys == 0 or shape.num_q_heads == 0:
        dtype = compute_dtype(query.dtype)
        return Partial.empty(shape.num_q_heads, shape.num_rows, shape.v_dim, dtype=dtype, device=query.device)
    if query.stride(-1) != 1:
        query = query.contiguous()
    if not fits_flash_cuda(query, key, value):
        return attend_ref(query, key, value, sm_scale=sm_scale, causal=causal)
    if not causal or shape.num_rows == 1:  # one row at the bottom right sees every key
        return _attend_all(query, key, value, sm_scale)
    return attend_causal(query, key, value, sm_scale, square=_attend_square, over_all=_attend_all)


def _attend_square(query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Partial:
    out, lse = flash_cuda(query[None], key[None], value[None], sm_scale=sm_scale, causal=True)
    return Partial(out[0], lse[0])


def _attend_all(query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Partial:
    """Every row over every key. Rows of a GQA group are stacked under their KV head, so keys are read once a group."""
    num_kv_heads = key.shape[0]
    grouped = query.reshape(1, num_kv_heads, -1, query.shape[2])
    out, lse = flash_cuda(grouped, key[None], value[None], sm_scale=sm_scale)
    return Partial(out.reshape(query.shape), lse.reshape(query.shape[:2]))
