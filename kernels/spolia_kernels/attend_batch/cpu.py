"""Decode rows over private tails on a CPU: one fused call for neighbours of like length."""

from __future__ import annotations

import torch
from torch import Tensor

from spolia_kernels.attend.cpu import attend_stacked
from spolia_kernels.attend.flash_cpu import fits_flash, flash
from spolia_kernels.attend_batch.lens import BatchLens, Cut
from spolia_kernels.attend_batch.reference import attend_batch_ref
from spolia_kernels.partial import Partial
from spolia_kernels.precision import compute_dtype

# A tail from here on may be split between threads, as `attend_stacked` decides; below it the question costs more
# (20 us) than an answer could save.
_LONG_TAIL = 4096


def attend_batch_cpu(query: Tensor, key: Tensor, value: Tensor, lens: BatchLens, *, sm_scale: float) -> Partial:
    """Computes `attend_batch` for CPU tensors that fit together; see there.

    14 query heads on 2, or 8 on 8, head_dim 64, float32, 2 threads: 32 tails of 160 keys, ms in one call, masked, and
    in a call each: 0.51, 0.49, 1.2; 1.2, 1.3, 1.9.
    """
    batch, num_q_heads, head_dim = query.shape
    num_kv_heads, v_dim = key.shape[1], value.shape[3]
    # The rows of one GQA group are stacked under their KV head: [batch, num_kv_heads, group_size, head_dim].
    grouped = query.reshape(batch, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    if grouped.stride(-1) != 1:
        grouped = grouped.contiguous()
    if lens.longest == 0 or num_q_heads == 0:
        return Partial.empty(num_q_heads, batch, v_dim, dtype=compute_dtype(query.dtype), device=query.device)
    if not fits_flash(grouped, key, value):
        longest = slice(lens.longest)
        return attend_batch_ref(query, key[:, :, longest], value[:, :, longest], lens.lens, sm_scale=sm_scale)
    parts = [_attend_cut(grouped, key, value, cut, sm_scale) for cut in lens.cuts]
    out, lse = parts[0] if len(parts) == 1 else (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))
    return Partial(out.reshape(batch, num_q_heads, v_dim).transpose(0, 1), lse.reshape(batch, num_q_heads).t())


def is_split(cut: Cut) -> bool:
    """Whether the keys of a cut may be attended in pieces."""
    return cut.count == 1 and cut.num_keys >= _LONG_TAIL


def _attend_cut(query: Tensor, key: Tensor, value: Tensor, cut: Cut, sm_scale: float) -> tuple[Tensor, Tensor]:
    """Attends a cut of query [batch, num_kv_heads, group_size, head_dim]; returns out of that shape, lse without its
    last dimension.
    """
    query = query.narrow(0, cut.first, cut.count)
    if cut.num_keys == 0:
        dtype = compute_dtype(query.dtype)
        return torch.zeros_like(query, dtype=dtype), query.new_full(query.shape[:3], float("-inf"), dtype=dtype)
    key = key.narrow(0, cut.first, cut.count).narrow(2, 0, cut.num_keys)
    value = value.narrow(0, cut.first, cut.count).narrow(2, 0, cut.num_keys)
    if is_split(cut):
        alone = attend_stacked(query[0], key[0], value[0], sm_scale=sm_scale)
        return alone.out[None], alone.lse[None]
    return flash(query, key, value, sm_scale=sm_scale, mask=cut.mask)
