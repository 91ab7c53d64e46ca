"""How far one policy's next-token distributions lie from full recompute's, position by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spolia_core.errors import InternalError
from spolia_fidelity.case import Case

ROUNDING_NATS = 1e-9
"""A KL divergence is never negative; its float64 sum may be, by less than this for any vocabulary in use."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One question under one policy: everything later figures need, and no tensor."""

    case: str
    cluster: str
    """The unit of resampling (`Case.cluster_name`)."""
    index: int
    """The question's place in its case. (case, index) pairs the outcomes of two policies."""
    task: str
    nll_sum: float
    """Nats, summed over the answer's tokens under teacher forcing."""
    num_tokens: int
    kls: tuple[float, ...]
    """KL(full || policy) in nats, one per scored position."""
    num_agreed: int
    """Scored positions where the first choice is full recompute's."""
    exact: bool | None = None
    """Whether the answer was right; None where the task has no exact match."""
    f1: float | None = None
    """Token F1 of a generated answer; None where nothing was generated."""

    @property
    def key(self) -> tuple[str, int]:
        """What pairs outcomes of different policies."""
        return self.case, self.index


@dataclass(frozen=True, slots=True)
class Distributions:
    """Next-token distributions at the scored positions of one question."""

    log_probs: Tensor
    """float64 [num_tokens, vocab], natural logs."""
    first_choices: Tensor
    """int64 [num_tokens]; the lowest id among equals."""

    @classmethod
    def of(cls, logits: Tensor) -> Distributions:
        """From logits [num_tokens, vocab] of any float dtype; row i predicts scored token i. Unchanged.

        First choices are taken from the logits as they came, so that a rounding in the softmax makes no tie. Raises
        `InternalError` when a logit is NaN or +inf.
        """
        if not bool((logits < float("inf")).all()):  # false for NaN as well
            raise InternalError("the model gave a logit that is NaN or infinite")
        return cls(torch.log_softmax(logits.to(torch.float64), dim=-1), first_choices(logits))


def first_choices(logits: Tensor) -> Tensor:
    """Ids of the highest logits, int64 [n]. Of equals the lowest id, which torch's argmax does not promise."""
    ids = torch.arange(logits.shape[-1], device=logits.device)
    is_best = logits == logits.max(dim=-1, keepdim=True).values
    return torch.where(is_best, ids, logits.shape[-1]).min(dim=-1).values


def kl_divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) of each row, nats; both float64 log-probabilities [n, vocab], result float64 [n].

    A token that the reference excludes (log-probability -inf) adds nothing; one that only `other` excludes makes the
    row infinite. A sum below zero by rounding is zero; one further below is an `InternalError`, never clamped.
    """
    terms = torch.where(reference == float("-inf"), 0.0, reference.exp() * (reference - other))
    sums = terms.sum(dim=-1)
    lowest = float(sums.min()) if sums.numel() else 0.0
    if not lowest >= -ROUNDING_NATS:
        raise InternalError(f"a KL divergence came out as {lowest} nats")
    return sums.clamp(min=0.0)


def token_nlls(log_probs: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Negative log-likelihood of `token_ids[i]` under row i, nats, float64 [n]."""
    if len(token_ids) != log_probs.shape[0]:
        raise InternalError(f"{len(token_ids)} tokens to score against {log_probs.shape[0]} distributions")
    ids = torch.tensor(token_ids, dtype=torch.int64, device=log_probs.device)
    return -log_probs.gather(1, ids[:, None])[:, 0]


def score(case: Case, index: int, distributions: Distributions, reference: Distributions) -> Outcome:
    """The outcome of question `index` of `case`, under the policy that gave `distributions`.

    `reference` is full recompute's for the same scored tokens; for full recompute itself pass it twice. `exact` is
    "every answer token is the first choice" where the question says so, else None: greedy decoding would then
    produce exactly that answer.
    """
    question = case.questions[index]
    nlls = token_nlls(distributions.log_probs, question.answer_ids)
    answer = torch.tensor(question.answer_ids, device=distributions.first_choices.device)
    return Outcome(
        case=case.name,
        cluster=case.cluster_name,
        index=index,
        task=question.task,
        nll_sum=float(nlls.sum()),
        num_tokens=len(question.answer_ids),
        kls=tuple(kl_divergence(reference.log_probs, distributions.log_probs).tolist()),
        num_agreed=int((distributions.first_choices == reference.first_choices).sum()),
        exact=bool((distributions.first_choices == answer).all()) if question.exact else None,
    )
