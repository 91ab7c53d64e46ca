"""Draws tokens from logits. Greedy, temperature, top-k, top-p, with numbers that depend on the counter only."""

from __future__ import annotations

import torch
from torch import Tensor

from spolia_core.errors import InternalError
from spolia_core.sampling import SamplingParams, uniform


def sample(logits: Tensor, params: SamplingParams, token_index: int, sample_index: int = 0) -> int:
    """The next token from `logits` [vocab_size], float32.

    Greedy takes the first of the largest. Otherwise temperature, then top-k, then top-p (the smallest set, most likely
    first, whose probability reaches `top_p`), then the inverse of the distribution function at
    `uniform(seed, sample_index, token_index)`: the order transformers and vLLM use. Raises `InternalError` for logits
    that are NaN.
    """
    if bool(logits.isnan().any()):
        raise InternalError("the model's logits are not numbers: its weights or its KV are broken")
    if params.is_greedy:
        return int(torch.argmax(logits))
    values, ids = torch.sort(logits.double(), descending=True, stable=True)
    values = (values - values[0]) / params.temperature  # from the largest down: no temperature makes it infinite
    if params.top_k:
        values = values[: params.top_k]
    probabilities = torch.softmax(values, -1)
    cumulative = torch.cumsum(probabilities, -1)
    # A token is kept while the mass before it is below top_p: the one that reaches top_p is the last kept.
    kept = int(((cumulative - probabilities) < params.top_p).sum())
    target = uniform(params.seed, sample_index, token_index) * float(cumulative[kept - 1])
    index = int(torch.searchsorted(cumulative[:kept], cumulative.new_tensor(target), right=True))
    return int(ids[min(index, kept - 1)])
