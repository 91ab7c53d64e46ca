"""Launches the sampling kernel. Imports Triton."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from spolia_kernels.sample.counter_triton import uniform_kernel
from spolia_kernels.sample.reference import Drawn, Draws
from spolia_kernels.sample.sample_triton import sample_kernel

MAX_BLOCK = 4096
"""Logits looked at together: 8 a thread of 16 warps, which have 128 registers each. Compiled for sm_90, a thread spills
8 bytes by Triton 3.6 and 32 by 3.8; with 16 logits, 672 bytes. What a launch takes was not measured."""
LOGITS_PER_WARP = 256
ROWS = 32
"""Random numbers made by one warp."""


def sample_rows(logits: Tensor, draws: Draws, into: Drawn, num_rows: Tensor) -> None:
    """See `spolia_kernels.sample.sample_rows`."""
    rows, vocab = logits.shape
    numbers = torch.empty(rows, dtype=torch.float64, device=logits.device)
    counters = (draws.seed, draws.sample_index, draws.token_index)
    uniform_kernel[(triton.cdiv(rows, ROWS),)](*counters, numbers, rows, BLOCK=ROWS, num_warps=1)
    block = min(MAX_BLOCK, triton.next_power_of_2(vocab))
    sample_kernel[(rows,)](
        logits,
        logits.stride(0),
        vocab,
        num_rows,
        draws.temperature,
        draws.top_p,
        draws.top_k,
        numbers,
        into.token_ids,
        into.logprobs,
        BLOCK=block,
        num_warps=max(1, min(16, block // LOGITS_PER_WARP)),
    )
