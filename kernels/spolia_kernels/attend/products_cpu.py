"""Attention on a CPU as two batched products a block of keys, where that is faster than the fused kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from spolia_kernels.partial import Partial

# The fused kernel takes its rows 32 at a time, 64 from 192 on and 256 from 768 on; a batched product takes them all.
# Float32, 2 threads, Intel Xeon, ms fused and in products: 2 heads, 224 rows over 1,024 keys 0.65, 0.62; over 4,096
# 2.74, 2.31; over 16,384 11.3, 8.5; 2 heads, 56 rows over 1,024 keys 0.22, 0.19; 8 heads over 4,096 keys: 48 rows 3.3,
# 2.7; 64 rows 4.0, 3.1; 128 rows 7.4, 5.2; 256 rows 11.7, 9.7; 512 rows 23, 19; 1,024 rows 40, 39. Of 32 rows 2.20,
# 2.08, but in a step nothing is left of that (61.4, 61.2 ms), and where threads wait for a core more calls wait longer.
_MIN_ROWS, _MAX_ROWS = 48, 767
_MIN_KEYS = 1024
# Scores of a block of keys, all heads: 2 MiB, which the cores' own caches hold. Half and twice as many are slower.
_NUM_SCORES = 1 << 19
# A sum of exponentials between this and its inverse: none was too large for float32, and what was too small for it
# counts for less than 2^-40 of the sum.
_SAFE_SUM = 2.0**64


def products_pay(query: Tensor, key: Tensor) -> bool:
    """Whether `attend_products` is the faster one for tensors as in `attend_stacked`."""
    is_between = _MIN_ROWS <= query.shape[1] <= _MAX_ROWS and key.shape[1] >= _MIN_KEYS
    return is_between and query.dtype == torch.float32


def attend_products(query: Tensor, key: Tensor, value: Tensor, *, sm_scale: float) -> Partial:
    """Computes `attend` of query [num_kv_heads, num_rows, head_dim] over one or more keys, all float32.

    A softmax subtracts a row's largest score so that no exponential overflows. To find and to subtract it takes two
    passes over all scores, a seventh of the time, and where scores are small the exponentials are as good without. What
    they were is seen from their sums: of the first block, and of all. Where a sum is out of range, all is computed
    again, less the largest score of every block.
    """
    scaled = query * sm_scale
    blocks = _Blocks(scaled, key)
    result = _attend_plain(scaled, key, value, blocks)
    return _attend_less_tops(scaled, key, value, blocks) if result is None else result


class _Blocks:
    """The cuts of the keys, and room for the scores of one."""

    def __init__(self, scaled: Tensor, key: Tensor) -> None:
        self._shape = scaled.shape[:2]
        num_keys, num_scores_of_key = key.shape[1], self._shape.numel()
        size = min(num_keys, max(1, _NUM_SCORES // num_scores_of_key))
        self.keys = [slice(start, min(start + size, num_keys)) for start in range(0, num_keys, size)]
        self._room = scaled.new_empty(num_scores_of_key * size)

    def scores(self, keys: slice) -> Tensor:
        """[num_kv_heads, num_rows, keys], not written yet; the one before may no longer be used."""
        num_keys = keys.stop - keys.start
        return self._room[: self._shape.numel() * num_keys].view(*self._shape, num_keys)


def _attend_plain(scaled: Tensor, key: Tensor, value: Tensor, blocks: _Blocks) -> Partial | None:
    """Attention by the exponentials of the scores as they are; None where a sum of them is out of range."""
    num_heads, num_rows, _ = scaled.shape
    sums = scaled.new_empty(len(blocks.keys), num_heads, num_rows)
    out = scaled.new_empty(num_heads, num_rows, value.shape[2])
    for block, keys in enumerate(blocks.keys):
        scores = torch.bmm(scaled, key[:, keys].mT, out=blocks.scores(keys))
        torch.sum(scores.exp_(), -1, out=sums[block])
        if block == 0:
            torch.bmm(scores, value[:, keys], out=out)
        elif block == 1 and not _are_safe(sums[0]):
            return None
        else:
            out.baddbmm_(scores, value[:, keys])
    total = sums.sum(0)
    if not _are_safe(total):
        return None
    return Partial(out.div_(total[..., None]), total.log_())


def _are_safe(sums: Tensor) -> bool:
    low, high = sums.aminmax()
    return float(low) > 1 / _SAFE_SUM and float(high) < _SAFE_SUM  # a NaN is not


def _attend_less_tops(scaled: Tensor, key: Tensor, value: Tensor, blocks: _Blocks) -> Partial:
    """Attention in which a block leaves its largest score, its sum of exponentials and its weighted values; at the end
    they are merged.
    """
    num_heads, num_rows, _ = scaled.shape
    outs = scaled.new_empty(len(blocks.keys), num_heads, num_rows, value.shape[2])
    tops, sums = scaled.new_empty(2, len(blocks.keys), num_heads, num_rows)
    for block, keys in enumerate(blocks.keys):
        scores = torch.bmm(scaled, key[:, keys].mT, out=blocks.scores(keys))
        torch.amax(scores, -1, out=tops[block])
        torch.sum(scores.sub_(tops[block][..., None]).exp_(), -1, out=sums[block])
        torch.bmm(scores, value[:, keys], out=outs[block])
    top = tops.amax(0)
    weights = tops.sub_(top).exp_()
    total = (weights * sums).sum(0)
    wide = weights.div_(total)[..., None]
    out = outs[0].mul_(wide[0])
    for part, weight in zip(outs[1:], wide[1:], strict=True):
        out.addcmul_(part, weight)
    return Partial(out, top.add_(total.log_()))
