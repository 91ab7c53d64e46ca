"""How likely a token was, and what else was likely."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities, before temperature, top-k and top-p.

    Under a constraint, among the tokens it allows: of what is drawn from.
    """

    logprob: float
    """Of the token that was drawn."""
    top: tuple[tuple[int, float], ...]
    """(token id, log-probability) of the likeliest, likeliest first."""

    def of(self, token_ids: Tensor) -> TokenLogprobs:
        """The same, told of indices into `token_ids`, with the ids in their place."""
        return replace(self, top=tuple((int(token_ids[index]), logprob) for index, logprob in self.top))


def logprobs_of(logits: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """Of a token drawn from `logits` [vocab_size], float32."""
    log_sum = torch.logsumexp(logits, -1)
    values, ids = torch.topk(logits, min(num_top, logits.shape[0])) if num_top else (logits[:0], logits[:0])
    top = tuple((int(i), float(v)) for i, v in zip(ids.tolist(), (values - log_sum).tolist(), strict=True))
    return TokenLogprobs(float(logits[token_id] - log_sum), top)
