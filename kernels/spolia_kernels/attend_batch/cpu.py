"""Decode rows over private tails on a CPU: one fused call per length, or one masked product for many short tails."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from spolia_kernels.attend.cpu import attend_stacked
from spolia_kernels.attend.flash_cpu import fits_flash, flash
from spolia_kernels.attend_batch.reference import attend_batch_ref
from spolia_kernels.partial import Partial
from spolia_kernels.precision import compute_dtype

# A tail from here on may be split between threads, as `attend_stacked` decides; below it the question costs more
# (20 us) than an answer could save.
_LONG_TAIL = 4096
# From this many calls on, all tails together may be cheaper masked: when they hold, padded to the longest, at most so
# many numbers of K and V for each call saved (32 Ki are 128 KiB in float32). See `attend_batch_cpu` for the figures.
_MIN_CALLS_TO_MASK = 8
_MAX_NUMBERS_PER_CALL = 1 << 15


def attend_batch_cpu(query: Tensor, key: Tensor, value: Tensor, key_lens: Tensor, *, sm_scale: float) -> Partial:
    """Computes `attend_batch` for CPU tensors that fit together; see there.

    A call per sequence costs about 40 us and reads what the sequence holds; one masked product costs 150 us, reads all
    tails padded to the longest and copies V to clear what lies past the lengths. Neighbours of one length, as samples
    of one prompt are, share a call. 14 query heads on 2, head_dim 64, float32, 2 threads, ms masked against calls:
    64 tails of 1-64 keys 0.9, 2.6; 8 of 1-64 keys 0.24, 0.32; 64 of 200-256 keys 3.7, 3.4; 64 of 1-1024 keys 14, 5.6;
    8 of 1-1024 keys 1.4, 0.57; 64 of 256 keys, one call, 3.5, 1.4.
    """
    batch, num_q_heads, head_dim = query.shape
    num_kv_heads, v_dim = key.shape[1], value.shape[3]
    lens = key_lens.tolist()
    longest = max(lens, default=0)
    # The rows of one GQA group are stacked under their KV head: [batch, num_kv_heads, group_size, head_dim].
    grouped = query.reshape(batch, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    if grouped.stride(-1) != 1:
        grouped = grouped.contiguous()
    if longest == 0 or num_q_heads == 0:
        return Partial.empty(num_q_heads, batch, v_dim, dtype=compute_dtype(query.dtype), device=query.device)
    stretches = [(num_keys, sum(1 for _ in neighbours)) for num_keys, neighbours in groupby(lens)]
    padded = batch * num_kv_heads * longest * (head_dim + v_dim)
    masked_is_cheaper = len(stretches) >= _MIN_CALLS_TO_MASK and padded <= len(stretches) * _MAX_NUMBERS_PER_CALL
    if masked_is_cheaper or not fits_flash(grouped, key, value):
        return attend_batch_ref(query, key[:, :, :longest], value[:, :, :longest], key_lens, sm_scale=sm_scale)
    outs, lses, first = [], [], 0
    for num_keys, count in stretches:
        tail_query = grouped.narrow(0, first, count)
        tail_key = key.narrow(0, first, count).narrow(2, 0, num_keys)
        tail_value = value.narrow(0, first, count).narrow(2, 0, num_keys)
        out, lse = _attend_equal(tail_query, tail_key, tail_value, sm_scale)
        outs.append(out)
        lses.append(lse)
        first += count
    out = torch.cat(outs).reshape(batch, num_q_heads, v_dim)
    lse = torch.cat(lses).reshape(batch, num_q_heads)
    return Partial(out.transpose(0, 1).contiguous(), lse.t().contiguous())


def _attend_equal(query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> tuple[Tensor, Tensor]:
    """Attends n sequences of one length.

    query [n, num_kv_heads, group_size, head_dim]; returns out of that shape and lse without its last dimension.
    """
    num_keys = key.shape[2]
    if num_keys == 0:
        dtype = compute_dtype(query.dtype)
        return torch.zeros_like(query, dtype=dtype), query.new_full(query.shape[:3], float("-inf"), dtype=dtype)
    if query.shape[0] == 1 and num_keys >= _LONG_TAIL:
        alone = attend_stacked(query[0], key[0], value[0], sm_scale=sm_scale)
        return alone.out[None], alone.lse[None]
    return flash(query, key, value, sm_scale=sm_scale)
