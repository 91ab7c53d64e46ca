"""Attend: queries over one contiguous set of keys, giving a partial.

CPU, K and V of one width, all of one dtype, last dimension dense: the fused kernel behind `flash_cpu.py`, cut
by `cpu.py` into what it answers well, or where it is slow two products a block of keys (`products_cpu.py`); K and
V are read in place. CPU otherwise (unequal widths, as compressed bases have them; mixed dtypes): the reference
over blocks of keys. CUDA, 16 bits: FlashAttention behind `flash_cuda.py`, cut by `cuda.py`. CUDA otherwise and all
else: the reference.
"""

from __future__ import annotations

from torch import Tensor

from spolia_kernels.attend.cpu import attend_cpu
from spolia_kernels.attend.cuda import attend_cuda
from spolia_kernels.attend.key_range import KeyRange
from spolia_kernels.attend.reference import attend_ref
from spolia_kernels.partial import Partial

__all__ = ["KeyRange", "attend", "attend_ref"]


def attend(query: Tensor, key: Tensor, value: Tensor, *, sm_scale: float, causal: bool = False) -> Partial:
    """Returns the partial of all rows of `query` over all keys they may see.

        s_ij = sm_scale * (q_i . k_j);   lse_i = log sum_j e^(s_ij);   out_i = sum_j e^(s_ij - lse_i) v_j

    Shapes: query [num_q_heads, num_rows, head_dim]; key [num_kv_heads, num_keys, head_dim]; value
    [num_kv_heads, num_keys, v_dim]. Query head h reads KV head h // (num_q_heads // num_kv_heads). Strides
    are free: views of larger extents are the normal case, and nothing outside the views is read. No input is
    changed.

    With `causal`, aligned at the bottom right, row i sees the keys j <= i + num_keys - num_rows: the rows are
    the last of the context the keys belong to. Fewer keys than rows leave the first rows empty.

    Computed and returned in float32, or float64 from float64 inputs. On the fused paths 16-bit inputs
    give an `out` rounded once to their dtype; `lse` never is. Zero rows or zero keys give an empty partial.
    The result's rounding may depend on the number of rows and threads, which choose how the work is cut.

    Raises ValueError where the shapes do not agree.

    Source: Hydragen (arXiv 2402.05099) §3.1-3.2, attention over a shared prefix with all its queries in one
    product; FlashAttention (arXiv 2205.14135) §3.1 for the LSE.
    """
    if query.device.type == "cpu":
        return attend_cpu(query, key, value, sm_scale=sm_scale, causal=causal)
    if query.device.type == "cuda":
        return attend_cuda(query, key, value, sm_scale=sm_scale, causal=causal)
    return attend_ref(query, key, value, sm_scale=sm_scale, causal=causal)
