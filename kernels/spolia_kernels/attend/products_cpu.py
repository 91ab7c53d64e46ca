"""Attention on a CPU as two batched products a block of keys, where that is faster than the fused kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from spolia_kernels.partial import Partial

# The fused kernel takes its rows 32 at a time, 64 from 192 on and 256 from 768 on; a batched product takes them all.
# Float32, 2 threads, Intel Xeon, ms fused and in products: 2 heads, 224 rows over 1,024 keys 0.59, 0.56; over 4,096
# 2.56, 2.30; over 16,384 10.6, 8.9; 8 heads over 4,096 keys: 48 rows 3.3, 3.8; 64 rows 3.9, 3.3; 128 rows 7.5, 6.1;
# 256 rows 11.9, 12.4.
_MIN_ROWS, _MAX_ROWS = 64, 255
_MIN_KEYS = 1024
# Scores of a block of keys, all heads: 2 MiB, which the cores' own caches hold. Half and twice as many are slower.
_NUM_SCORES = 1 << 19


def products_pay(query: Tensor, key: Tensor) -> bool:
    """Whether `attend_products` is the faster one for tensors as in `attend_stacked`."""
    is_between = _MIN_ROWS <= query.shape[1] <= _MAX_ROWS and key.shape[1] >= _MIN_KEYS
    return is_between and query.dtype == torch.float32


def attend_products(query: Tensor, key: Tensor, value: Tensor, *, sm_scale: float) -> Partial:
    """Computes `attend` of query [num_kv_heads, num_rows, head_dim] over one or more keys, all float32.

    A block leaves its largest score, its sum of exponentials and its weighted values; at the end they are merged.
    """
    num_heads, num_rows, _ = query.shape
    num_keys = key.shape[1]
    size = min(num_keys, max(1, _NUM_SCORES // (num_heads * num_rows)))
    starts = range(0, num_keys, size)
    scaled = (query * sm_scale).mT
    room = query.new_empty(num_heads * size * num_rows)
    outs = query.new_empty(len(starts), num_heads, num_rows, value.shape[2])
    tops, sums = query.new_empty(2, len(starts), num_heads, num_rows)
    for block, start in enumerate(starts):
        end = min(start + size, num_keys)
        scores = room[: num_heads * (end - start) * num_rows].view(num_heads, end - start, num_rows)
        torch.bmm(key[:, start:end], scaled, out=scores)
        torch.amax(scores, 1, out=tops[block])
        scores.sub_(tops[block][:, None]).exp_()
        torch.sum(scores, 1, out=sums[block])
        torch.bmm(scores.mT, value[:, start:end], out=outs[block])
    top = tops.amax(0)
    weights = tops.sub_(top).exp_()
    total = (weights * sums).sum(0)
    wide = weights.div_(total)[..., None]
    out = outs[0].mul_(wide[0])
    for part, weight in zip(outs[1:], wide[1:], strict=True):
        out.addcmul_(part, weight)
    return Partial(out, top.add_(total.log_()))
