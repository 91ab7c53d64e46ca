"""The merge on a CPU: one read and one write of the accumulator per part, no stacked copy of the outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spolia_kernels.merge.reference import merge_weights
from spolia_kernels.partial import Partial


def merge_cpu(partials: Sequence[Partial]) -> Partial:
    """Computes `merge` part by part; the parts are left unchanged."""
    weights, lse = merge_weights(torch.stack([part.lse for part in partials]))
    outs = [part.out for part in partials]
    if bool((weights == 0.0).any()):
        outs = [_counted(out, weight) for out, weight in zip(outs, weights, strict=True)]
    wide = weights[..., None]
    merged = outs[0] * wide[0]
    for out, weight in zip(outs[1:], wide[1:], strict=True):
        merged.addcmul_(out, weight)
    return Partial(merged, lse)


def merge_into_cpu(acc: Partial, part: Partial) -> None:
    """Merges `part` into all rows of `acc`, in place; `acc` may be a view."""
    weights, lse = merge_weights(torch.stack([acc.lse, part.lse]))
    acc_weight, part_weight = weights.unbind()
    unseen = acc_weight == 0.0
    if bool(unseen.any()):
        acc.out.masked_fill_(unseen[..., None], 0.0)
    acc.out.mul_(acc_weight[..., None]).addcmul_(_counted(part.out, part_weight), part_weight[..., None])
    acc.lse.copy_(lse)


def _counted(out: Tensor, weight: Tensor) -> Tensor:
    """Returns `out`, with 0 in the rows of weight 0: an empty row's `out` may hold anything, NaN included."""
    unseen = weight == 0.0
    return out.masked_fill(unseen[..., None], 0.0) if bool(unseen.any()) else out
