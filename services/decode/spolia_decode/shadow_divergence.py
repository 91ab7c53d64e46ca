"""How far two next-token distributions lie apart, at the positions that predict an answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_NATS = 100.0
"""Cap of one token's figures, also where damaged KV makes them infinite or no number: means and sums stay numbers."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """What a check found, over the tokens of one answer; all in nats.

    `kl_nats[i]` is KL(exact ‖ linked) of the distributions that predict token i; `num_agreed` counts tokens where both
    have the same most likely one. The sums are of -log p of the answer's own tokens.
    """

    kl_nats: tuple[float, ...]
    num_agreed: int
    exact_nll_nats: float
    linked_nll_nats: float

    @property
    def num_tokens(self) -> int:
        """Tokens compared."""
        return len(self.kl_nats)

    @property
    def mean_kl_nats(self) -> float:
        """Mean over the tokens compared, of which there is at least one."""
        return math.fsum(self.kl_nats) / self.num_tokens

    @property
    def top1_agreement(self) -> float:
        """Share of tokens where the most likely one is the same."""
        return self.num_agreed / self.num_tokens

    @property
    def nll_increase_nats(self) -> float:
        """Per token, how much less likely the answer is to the linked context; negative where it is more likely."""
        return (self.linked_nll_nats - self.exact_nll_nats) / self.num_tokens

    @classmethod
    def of(cls, exact_logits: Tensor, linked_logits: Tensor, token_ids: Sequence[int]) -> Divergence:
        """Compares logits [num_tokens, vocab_size] that predict `token_ids`."""
        exact = torch.log_softmax(exact_logits, -1, dtype=torch.float32)
        linked = torch.log_softmax(linked_logits, -1, dtype=torch.float32)
        # A token that the exact context cannot produce (-inf) adds nothing.
        kl = torch.where(exact == -math.inf, 0.0, exact.exp() * (exact - linked)).sum(-1)
        tokens = torch.tensor(list(token_ids), device=exact.device)[:, None]
        return cls(
            tuple(_capped(kl).tolist()),
            int((exact.argmax(-1) == linked.argmax(-1)).sum()),
            float(_capped(-exact.gather(-1, tokens)).sum()),
            float(_capped(-linked.gather(-1, tokens)).sum()),
        )

    @classmethod
    def joined(cls, pieces: Sequence[Divergence]) -> Divergence:
        """The divergence over all tokens of consecutive pieces of an answer."""
        return cls(
            tuple(kl for piece in pieces for kl in piece.kl_nats),
            sum(piece.num_agreed for piece in pieces),
            math.fsum(piece.exact_nll_nats for piece in pieces),
            math.fsum(piece.linked_nll_nats for piece in pieces),
        )


def _capped(nats: Tensor) -> Tensor:
    """As float64 in 0 … `MAX_NATS`; rounding may have left what is never negative a little below 0."""
    return nats.double().nan_to_num(nan=MAX_NATS).clamp(0.0, MAX_NATS)
