"""The merge of partials, in the words of its definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spolia_kernels.partial import Partial


def merge_weights(lse: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what each part counts for and the LSE of them all.

        m = max_i l_i;   w_i = e^(l_i - m) / sum_i e^(l_i - m);   lse = m + log sum_i e^(l_i - m)

    `lse` is [num_parts, num_q_heads, num_rows]; the weights have its shape and sum to 1 over the parts,
    except where every part is empty: there they are 0 and the LSE is -inf. Dividing by the sum, rather than
    taking e^(l_i - lse), keeps the rounding of a large LSE out of the weights.
    """
    top = lse.amax(dim=0)
    top = top.masked_fill(top == float("-inf"), 0.0)  # -inf - -inf is NaN; -inf - 0 is an empty part's weight
    exp = torch.exp(lse - top)
    total = exp.sum(dim=0)
    return exp / total.masked_fill(total == 0.0, 1.0), top + torch.log(total)


def merge_ref(partials: Sequence[Partial]) -> Partial:
    """Computes `merge` with all parts stacked; see there for shapes and meaning."""
    weights, lse = merge_weights(torch.stack([part.lse for part in partials]))
    outs = torch.stack([part.out for part in partials])
    outs = torch.where(weights[..., None] == 0.0, 0.0, outs)  # an empty part's `out` is never read
    return Partial((weights[..., None] * outs).sum(dim=0), lse)
