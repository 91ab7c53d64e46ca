"""Attention on a CPU: the fused kernel, cut so that it is always asked what it answers well."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spolia_kernels.attend.causal import attend_causal
from spolia_kernels.attend.flash_cpu import fits_flash, flash, flash_one
from spolia_kernels.attend.native_cpu import attend_native, native_for
from spolia_kernels.attend.products_cpu import attend_products, products_pay
from spolia_kernels.attend.reference import attend_ref
from spolia_kernels.attend.shapes import AttendShape
from spolia_kernels.merge import merge
from spolia_kernels.partial import Partial
from spolia_kernels.precision import compute_dtype

# The fused kernel hands its threads blocks of 32 to 256 rows of one head
# (aten/native/cpu/FlashAttentionKernel.cpp); 64 is the middle one, and only the shape of the split depends on
# it, never the result.
_ROWS_PER_TASK = 64
# Keys are split between threads from this many per split on. 8 query heads on 1 KV head, head_dim 64, 1 row, float32,
# 2 threads: 1024 keys 0.11 -> 0.18 ms, 8192 keys 0.52 -> 0.36, 16384 keys 1.9 -> 1.2.
_MIN_KEYS_PER_SPLIT = 2048
# Scores the reference may hold at once: 4 Mi numbers are 16 MiB in float32, within a last-level cache.
_MAX_SCORES = 1 << 22


def attend_cpu(query: Tensor, key: Tensor, value: Tensor, *, sm_scale: float, causal: bool = False) -> Partial:
    """Computes `attend` for CPU tensors of agreeing shapes; see there."""
    shape = AttendShape.of(query, key, value)
    if shape.num_rows == 0 or shape.num_keys == 0 or shape.num_q_heads == 0:
        dtype = compute_dtype(query.dtype)
        return Partial.empty(shape.num_q_heads, shape.num_rows, shape.v_dim, dtype=dtype, device=query.device)
    if causal and shape.num_rows > 1:
        return attend_causal(query, key, value, sm_scale, square=_attend_square, over_all=_attend_all)
    return _attend_all(query, key, value, sm_scale)  # one row at the bottom right sees every key


def _attend_square(query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Partial:
    """Causal attention of n rows over n keys: row i sees keys 0..i."""
    if query.stride(-1) != 1:
        query = query.contiguous()
    if fits_flash(query, key, value):
        return flash_one(query, key, value, sm_scale=sm_scale, causal=True)
    num_q_heads, num_rows, _ = query.shape
    if num_q_heads * num_rows * num_rows <= _MAX_SCORES or num_rows == 1:
        return attend_ref(query, key, value, sm_scale=sm_scale, causal=True)
    half = num_rows // 2
    first = _attend_square(query[:, :half], key[:, :half], value[:, :half], sm_scale)
    second = attend_causal(query[:, half:], key, value, sm_scale, square=_attend_square, over_all=_attend_all)
    return Partial(torch.cat([first.out, second.out], dim=1), torch.cat([first.lse, second.lse], dim=1))


def _attend_all(query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Partial:
    """Attention of every row over every key, the rows of one GQA group stacked under their KV head.

    The fused kernel knows GQA, but reads the keys once per query head; stacked, it reads them once per group. 32 query
    heads on 8, head_dim 64, float32, 2 threads, ms its own GQA -> stacked: 1 row over 2048 keys 0.79 -> 0.44, over
    16384 keys 28 -> 17; 8 rows over 16384 keys 41 -> 24; 128 rows over 2048 keys 27 -> 22. The stacking itself costs
    10 us.
    """
    num_q_heads, num_rows, head_dim = query.shape
    num_kv_heads = key.shape[0]
    grouped = query.reshape(num_kv_heads, num_q_heads // num_kv_heads * num_rows, head_dim)
    if grouped.stride(-1) != 1:
        grouped = grouped.contiguous()
    if (here := native_for(grouped, key, value)) is not None:
        result = attend_native(here, grouped, key, value, sm_scale=sm_scale)
    elif fits_flash(grouped, key, value):
        result = attend_stacked(grouped, key, value, sm_scale=sm_scale)
    else:
        result = _attend_blocked(grouped, key, value, sm_scale)
    return Partial(result.out.reshape(num_q_heads, num_rows, -1), result.lse.reshape(num_q_heads, num_rows))


def attend_stacked(query: Tensor, key: Tensor, value: Tensor, *, sm_scale: float) -> Partial:
    """Runs the fused kernel over one or more equal cuts of the keys, so that all threads have work, or two products
    where they are faster.

    query [num_kv_heads, group_size * num_rows, head_dim], tensors for which `fits_flash` holds. The cuts are a batch
    dimension of views, so nothing is copied; their partials merge exactly.
    """
    if products_pay(query, key):
        return attend_products(query, key, value, sm_scale=sm_scale)
    num_heads, num_keys, width = key.shape
    cuts = num_splits(num_heads, query.shape[1], num_keys)
    if cuts == 1:
        return flash_one(query, key, value, sm_scale=sm_scale)
    even = num_keys // cuts * cuts
    out, lse = flash(
        query[None].expand(cuts, -1, -1, -1),
        key[:, :even].view(num_heads, cuts, -1, width).transpose(0, 1),
        value[:, :even].view(num_heads, cuts, -1, width).transpose(0, 1),
        sm_scale=sm_scale,
    )
    parts = [Partial(out[i], lse[i]) for i in range(cuts)]
    if even < num_keys:
        parts.append(flash_one(query, key[:, even:], value[:, even:], sm_scale=sm_scale))
    return merge(parts)


def num_splits(num_kv_heads: int, num_stacked_rows: int, num_keys: int) -> int:
    """Returns the number of cuts of the keys that keeps the threads evenly busy; 1 leaves them whole.

    `num_stacked_rows`: of one KV head, all query heads of its group.
    """
    num_threads, num_tasks = torch.get_num_threads(), num_kv_heads * math.ceil(num_stacked_rows / _ROWS_PER_TASK)
    rounds = math.ceil(num_tasks / num_threads)
    if num_tasks > 0.7 * rounds * num_threads:
        return 1
    return max(1, min(num_threads // math.gcd(num_tasks, num_threads), num_keys // _MIN_KEYS_PER_SPLIT))


def _attend_blocked(query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Partial:
    """Runs the reference over blocks of keys, so that the scores held at once stay bounded."""
    num_heads, num_rows, _ = query.shape
    num_keys = key.shape[1]
    block = max(128, _MAX_SCORES // (num_heads * num_rows))
    return merge(
        [
            attend_ref(query, key[:, start : start + block], value[:, start : start + block], sm_scale=sm_scale)
            for start in range(0, num_keys, block)
        ]
    )
