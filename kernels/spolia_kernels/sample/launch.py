"""Launches the sampling kernels. Imports Triton."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from spolia_kernels.sample.counter_triton import uniform_kernel
from spolia_kernels.sample.reference import Drawn, Draws
from spolia_kernels.sample.sample_triton import sample_kernel
from spolia_kernels.sample.summary_triton import summarize_kernel

ROWS = 32
"""Random numbers made by one warp."""
STRIP = 128
"""Logits of which the largest is kept: 256 bytes, which a gather reads as well as a row."""
STRIPS = 32
"""Strips of a part, and of a step of gathering."""
FEW = 64
"""Logits that a draw looks at first, at least. A CPU's sampler begins with as many."""
CAPACITY = 4096
"""Logits that are kept apart to draw from; where more are as likely, the row is walked."""
BLOCK = 4096
"""Logits of a row looked at together: 8 a thread of 16 warps."""
LIST_BLOCK = 1024


def sample_rows(logits: Tensor, draws: Draws, into: Drawn, num_rows: Tensor) -> None:
    """See `spolia_kernels.sample.sample_rows`."""
    rows, vocab = logits.shape
    device = logits.device

    def room(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    numbers = room(rows, dtype=torch.float64)
    counters = (draws.seed, draws.sample_index, draws.token_index)
    uniform_kernel[(triton.cdiv(rows, ROWS),)](*counters, numbers, rows, BLOCK=ROWS, num_warps=1)
    num_parts = triton.cdiv(vocab, STRIP * STRIPS)
    num_strips = triton.next_power_of_2(num_parts * STRIPS)
    highest = room(rows, num_parts * STRIPS)
    tops, sums, masses = (room(rows, num_parts, dtype=torch.float32) for _ in range(3))
    common = (logits, logits.stride(0), vocab, num_rows, draws.temperature)
    summarize_kernel[(num_parts, rows)](*common, highest, tops, sums, masses, STRIP=STRIP, STRIPS=STRIPS, num_warps=4)
    sample_kernel[(rows,)](
        *common,
        draws.top_p,
        draws.top_k,
        numbers,
        highest,
        tops,
        sums,
        masses,
        num_parts,
        room(rows, num_strips),
        room(rows, CAPACITY),
        room(rows, CAPACITY),
        into.token_ids,
        into.logprobs,
        STRIP=STRIP,
        STRIPS=STRIPS,
        NUM_STRIPS=num_strips,
        NUM_PARTS=triton.next_power_of_2(num_parts),
        FEW=FEW,
        CAPACITY=CAPACITY,
        LIST_BLOCK=LIST_BLOCK,
        BLOCK=BLOCK,
        num_warps=16,
    )
