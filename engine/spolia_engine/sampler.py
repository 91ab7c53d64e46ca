"""Draws tokens from logits. Greedy, temperature, top-k, top-p, with numbers that depend on the counter only."""

from __future__ import annotations

import torch
from torch import Tensor

from spolia_core.errors import InternalError
from spolia_core.sampling import SamplingParams, uniform

FEW_CANDIDATES = 1024
"""152 thousand logits, two threads, ms a token: 19 with all sorted; with so many 1.4 at top_p 0.9, 0.6 at top_k 50."""


def sample(logits: Tensor, params: SamplingParams, token_index: int, sample_index: int = 0) -> int:
    """The next token from `logits` [vocab_size], float32.

    Greedy takes the first of the largest; of equal logits the smaller id counts as the likelier. Otherwise temperature,
    then top-k, then top-p (the smallest set, most likely first, whose probability reaches `top_p`), then the inverse of
    the distribution function at `uniform(seed, sample_index, token_index)`: the order transformers and vLLM use. Raises
    `InternalError` for logits that are NaN.
    """
    if bool(logits.isnan().any()):
        raise InternalError("the model's logits are not numbers: its weights or its KV are broken")
    if params.is_greedy:
        return int(torch.argmax(logits))
    target = uniform(params.seed, sample_index, token_index)
    num_candidates = min(params.top_k or len(logits), len(logits))
    # The likeliest few hold nearly every draw, and are found without sorting a vocabulary.
    few = min(num_candidates, max(FEW_CANDIDATES, params.top_k))
    drawn = _draw(logits, few, num_candidates, params, target)
    if drawn is None:
        drawn = _draw(logits, num_candidates, num_candidates, params, target)
        assert drawn is not None, "all were looked at"
    return drawn


def _draw(logits: Tensor, num_looked_at: int, num_candidates: int, params: SamplingParams, target: float) -> int | None:
    """The token at `target` (0 … 1) of the distribution over the likeliest `num_candidates`, likeliest first.

    None where that lies behind the `num_looked_at` likeliest.
    """
    values, ids = _likeliest(logits, num_looked_at)
    # From the largest down: no temperature makes it infinite.
    weights = torch.exp((values.double() - values[0].double()) / params.temperature)
    total = weights.sum()
    if num_looked_at < num_candidates:
        total = torch.exp((logits.double() - values[0].double()) / params.temperature).sum()
    probabilities = weights / total
    cumulative = torch.cumsum(probabilities, -1)
    # A token is kept while the mass before it is below top_p: the one that reaches top_p is the last kept.
    kept = int(((cumulative - probabilities) < params.top_p).sum())
    is_whole = num_looked_at == num_candidates
    if kept == num_looked_at and not is_whole and params.top_p < 1.0:
        return None
    mass = float(cumulative[kept - 1]) if is_whole or kept < num_looked_at else 1.0
    index = int(torch.searchsorted(cumulative[:kept], cumulative.new_tensor(target * mass), right=True))
    if index >= kept and not is_whole and kept == num_looked_at:
        return None
    return int(ids[min(index, kept - 1)])


def _likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest and their ids, equal ones by id: in 16 bits many are, and every device must order them alike."""
    values, ids = torch.topk(logits, min(count + 1, len(logits)))
    if bool((values[1:] == values[:-1]).any()):
        among = (logits >= values[min(count, len(values)) - 1]).nonzero()[:, 0]
        values, order = torch.sort(logits[among], descending=True, stable=True)
        ids = among[order]
    return values[:count], ids[:count]
