"""Sample: a token a row, each row by parameters of its own, and how likely it was.

CUDA: two Triton kernels, the numbers and the draws, fit for CUDA graphs: parameters and the number of rows are read on
the device. Elsewhere:
`reference.py`. Both draw what the engine's sampler draws on a CPU.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from spolia_kernels.sample.reference import Drawn, Draws, sample_ref

__all__ = ["Drawn", "Draws", "sample_ref", "sample_rows"]


def sample_rows(logits: Tensor, draws: Draws, *, into: Drawn | None = None, num_rows: Tensor | None = None) -> Drawn:
    """Draws the next token of every row of `logits` [num_rows, vocab_size], float32 or 16 bits, vocabulary dense.

    Tokens in the order of their logits, equal ones by id, weigh e^(logit / temperature). Kept are the first `top_k`;
    of these the smallest beginning whose share reaches `top_p`; of these the row takes the one at which the sum of
    weights passes u times the whole, u being `spolia_core.sampling.uniform(seed, sample_index, token_index)`.
    Temperature 0 takes the first. Sums are float64.

    `into` is written and returned. `num_rows` int32 [1]: only so many rows are there, which is read on the device; all
    where it is None. The order of filters is that of transformers and vLLM.
    """
    if into is None:
        into = Drawn.zeros(logits.shape[0], logits.device)
    if logits.device.type != "cuda":
        there = logits.shape[0] if num_rows is None else int(num_rows)
        found = sample_ref(logits[:there], draws)
        into.token_ids[:there], into.logprobs[:there] = found.token_ids, found.logprobs
        return into
    from spolia_kernels.sample import launch  # Triton is there where a CUDA device is

    launch.sample_rows(logits, draws, into, _all_rows(logits.shape[0], logits.device) if num_rows is None else num_rows)
    return into


@cache
def _all_rows(num_rows: int, device: torch.device) -> Tensor:
    return torch.tensor([num_rows], dtype=torch.int32, device=device)
