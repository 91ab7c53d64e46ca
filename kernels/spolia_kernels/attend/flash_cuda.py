"""The one door to torch's FlashAttention on CUDA, which returns output and LSE in one pass.

`aten::_scaled_dot_product_flash_attention` takes 16-bit numbers only, heads of up to 256, and counts `is_causal` from
the top left. Nothing else in the engine calls it. Source: FlashAttention-2 (2307.08691).
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default
_DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def fits_flash_cuda(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Says whether `flash_cuda` may be called on tensors [..., num_heads, num, dim] with agreeing shapes."""
    return (
        query.device.type == "cuda"
        and query.dtype in _DTYPES
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == value.shape[-1] <= MAX_HEAD_DIM
        and query.shape[-1] % 8 == 0
        and query.numel() > 0
        and key.numel() > 0
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and torch.cuda.get_device_capability(query.device)[0] >= 8
    )


def flash_cuda(
    query: Tensor, key: Tensor, value: Tensor, *, sm_scale: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Runs the kernel on [batch, num_heads, num, head_dim] tensors for which `fits_flash_cuda` holds.

    Returns out [batch, num_q_heads, num_rows, head_dim], rounded once to the inputs' dtype, and lse, the same without
    head_dim, both float32. Any strides but the last; `causal` wants num_rows == num_keys.
    """
    assert not causal or query.shape[2] == key.shape[2], "causal is top-left aligned: only a square is unambiguous"
    out, lse, *_ = _FLASH(query, key, value, 0.0, causal, False, scale=sm_scale)
    return out.float(), lse[..., : query.shape[2]].float()
