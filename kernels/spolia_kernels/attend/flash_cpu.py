"""The one door to torch's fused CPU attention, with the guards it needs.

`aten::_scaled_dot_product_flash_attention_for_cpu` returns output and LSE in one pass and needs no compiler,
but is internal and trusts its caller. Measured on torch 2.13: zero keys or zero rows kill the process; a last
dimension whose stride is not 1 is read as if it were; a fully masked row reports LSE 0; K and V must be
equally wide; `is_causal` counts from the top left. Nothing else in the project calls it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spolia_kernels.partial import Partial
from spolia_kernels.precision import compute_dtype

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fits_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Says whether `flash` may be called on tensors [..., num_heads, num, dim] with agreeing shapes."""
    return (
        query.device.type == "cpu"
        and query.dtype in _DTYPES
        and query.dtype == key.dtype == value.dtype
        and key.shape[-1] == value.shape[-1]
        and query.numel() > 0
        and key.numel() > 0
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    )


def flash(
    query: Tensor, key: Tensor, value: Tensor, *, sm_scale: float, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Runs the fused kernel on [batch, num_heads, num, head_dim] tensors for which `fits_flash` holds.

    Returns out [batch, num_q_heads, num_rows, v_dim] and lse [batch, num_q_heads, num_rows], both float32
    (float64 for float64). From 16-bit inputs the kernel returns a 16-bit `out`, rounded once, and a float32
    `lse`. Any strides but the last are fine; K and V are not copied. `causal` wants num_rows == num_keys. `mask`, added
    to the scores, is of the query's dtype and broadcasts to [batch, num_q_heads, num, num_keys]; it may hide no row
    whole, and what it hides must be finite all the same. It costs nothing that could be measured.
    """
    assert fits_flash(query, key, value), "flash would crash or misread these tensors"
    assert not causal or query.shape[2] == key.shape[2], "causal is top-left aligned: only a square is unambiguous"
    return flash_again(query, key, value, sm_scale=sm_scale, causal=causal, mask=mask)


def flash_again(
    query: Tensor, key: Tensor, value: Tensor, *, sm_scale: float, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`flash` for tensors alike in shape, strides and dtype to others for which `fits_flash` held: one layer's after
    another's. The question takes 5 us in a step, the call itself 20.
    """
    out, lse = _FLASH(query, key, value, 0.0, causal, attn_mask=mask, scale=sm_scale)
    dtype = compute_dtype(query.dtype)
    return (out, lse) if out.dtype == dtype else (out.to(dtype), lse.to(dtype))


def flash_one(query: Tensor, key: Tensor, value: Tensor, *, sm_scale: float, causal: bool = False) -> Partial:
    """Runs `flash` on [num_heads, num, head_dim] tensors: a batch of one."""
    out, lse = flash(query[None], key[None], value[None], sm_scale=sm_scale, causal=causal)
    return Partial(out[0], lse[0])
