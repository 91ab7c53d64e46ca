"""How attention is cut for FlashAttention on a GPU, and how that is called: the cuts by the CPU's fused kernel in its
place, the call on tensors without numbers. What it computes is for a device to say.
"""

from __future__ import annotations

import pytest
import torch
from kernel_worlds import assert_same, oracle, problem

from spolia_kernels import attend
from spolia_kernels.attend import cuda
from spolia_kernels.attend.flash_cpu import flash
from spolia_kernels.attend.flash_cuda import flash_cuda


@pytest.mark.parametrize(("rows", "keys"), [(1, 5), (7, 7), (5, 12), (9, 4), (0, 3), (3, 0)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ratio", [1, 3])
def test_every_cut_is_attention(
    rows: int, keys: int, causal: bool, ratio: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "fits_flash_cuda", lambda query, key, value: True)
    monkeypatch.setattr(cuda, "flash_cuda", flash)
    p = problem(rows, keys, ratio=ratio)
    found = cuda.attend_cuda(p.query, p.key, p.value, sm_scale=p.sm_scale, causal=causal)
    assert_same(found, oracle(p.query, p.key, p.value, sm_scale=p.sm_scale, causal=causal))


@pytest.mark.parametrize(("q_heads", "keys", "causal"), [(8, 9, True), (2, 40, False)])
def test_flash_attention_takes_what_it_is_given(q_heads: int, keys: int, causal: bool) -> None:
    query = torch.empty(1, q_heads, 9, 64, dtype=torch.bfloat16, device="meta")
    memory = torch.empty(1, 2, 100, 64, dtype=torch.bfloat16, device="meta")[:, :, 3 : 3 + keys]
    out, lse = flash_cuda(query, memory, memory, sm_scale=0.1, causal=causal)
    assert (out.shape, out.dtype) == ((1, q_heads, 9, 64), torch.float32)
    assert (lse.shape, lse.dtype) == ((1, q_heads, 9), torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "keys", "causal"), [(1, 300, False), (130, 130, True), (64, 1000, True), (9, 4, True)]
)
def test_a_device_gives_the_partials_of_their_definition(
    dtype: torch.dtype, rows: int, keys: int, causal: bool
) -> None:
    p = problem(rows, keys, ratio=4, head_dim=128, dtype=dtype)
    held = [t.contiguous().to("cuda") for t in (p.query, p.key, p.value)]
    found = attend(*held, sm_scale=p.sm_scale, causal=causal)
    expected = oracle(p.query, p.key, p.value, sm_scale=p.sm_scale, causal=causal)
    here = type(found)(found.out.cpu(), found.lse.cpu())
    assert_same(here, expected, 2e-2 if dtype == torch.bfloat16 else 3e-3)
