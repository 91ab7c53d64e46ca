"""The one door to oneDNN's products with weights packed beforehand.

`mkldnn::_reorder_linear_weight` and `mkldnn::_linear_pointwise` are what torch's compiler emits for frozen weights;
they need no compiler, but are internal. Nothing else in the project calls them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NAMES = ("_reorder_linear_weight", "_linear_pointwise")


def can_pack(weight: Tensor) -> bool:
    """Whether `pack` and `packed_linear` may be used for a weight [num_out, num_in].

    Other dtypes stay plain: on machines without their instructions oneDNN converts them at every product.
    """
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() > 0
        and torch._C._has_mkldnn
        and all(hasattr(torch.ops.mkldnn, name) for name in _NAMES)
    )


def pack(weight: Tensor) -> Tensor:
    """A copy of a weight for which `can_pack` holds, in the blocked layout that the product reads in order."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., num_in] times a packed weight's transpose, plus bias: [..., num_out]."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


def packed_linear_added(base: Tensor, x: Tensor, packed: Tensor) -> Tensor:
    """`base` [num_rows, num_out] plus x [num_rows, num_in] times a packed weight's transpose, a new tensor."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, base, packed, None, "add")
    return out
