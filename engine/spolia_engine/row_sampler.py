"""Draws the next tokens of many rows at once, as `sample` draws each.

A draw is a dozen operations on a few hundred numbers, each of which costs more to begin than to do: 32 rows of 3,072
logits, top-p 0.9, take 16 ms one after the other and the step before them 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spolia_core.sampling import SamplingParams, uniform
from spolia_engine.sampler import FEW_CANDIDATES, sample

FEWER_CANDIDATES = 64
"""Looked at first: a model that is sure of itself leaves less to top-p, and so few are found in a fifth of the time."""

IN_CACHE = 1 << 16
"""Logits whose weights are summed together: in 64 bits they stay in a core's cache."""

NOT_NUMBERS = -1
"""In the place of a token: the row's logits are NaN."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Which number of which request a row is drawn for."""

    params: SamplingParams
    token_index: int
    sample_index: int = 0


def sample_rows(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """The next token of each row of `logits` [num_rows, vocab_size], float32, or `NOT_NUMBERS`.

    What `sample` says of the row: it does not depend on the others.
    """
    best = logits.argmax(-1)  # NaN counts as the largest
    highest = logits.gather(-1, best[:, None])
    tokens: list[int] = best.tolist()
    broken = highest.isnan()[:, 0].tolist()
    left: list[int] = []
    for row, draw in enumerate(draws):
        if broken[row]:
            tokens[row] = NOT_NUMBERS
        elif not draw.params.is_greedy:
            left.append(row)
    rows = _Rows(logits, highest.double(), draws)
    for count in (FEWER_CANDIDATES, FEW_CANDIDATES):
        if count >= logits.shape[-1]:
            break
        alike = [row for row in left if draws[row].params.top_k <= count]
        for row, token in zip(alike, rows.among(alike, count), strict=True):
            if token is not None:
                tokens[row] = token
                left.remove(row)
    for row in left:
        draw = draws[row]
        tokens[row] = sample(logits[row], draw.params, draw.token_index, draw.sample_index)
    return tokens


class _Rows:
    """Rows to draw from, and the weight of all tokens of each, which takes reading them all: at most once."""

    def __init__(self, logits: Tensor, highest: Tensor, draws: Sequence[Draw]) -> None:
        """`highest` [num_rows, 1], float64."""
        self._logits = logits
        self._highest = highest
        self._draws = draws
        self._temperature = _column([draw.params.temperature or 1.0 for draw in draws])
        self._totals: dict[int, float] = {}

    def among(self, rows: Sequence[int], count: int) -> list[int | None]:
        """The tokens of some rows, where the likeliest `count` decide; None where they do not, or two are as likely."""
        if not rows:
            return []
        chosen = torch.tensor(rows)
        draws = [self._draws[row] for row in rows]
        top_p = _column([draw.params.top_p for draw in draws])
        top_k = torch.tensor([draw.params.top_k for draw in draws])[:, None]
        values, ids = torch.topk(self._logits if len(rows) == len(self._logits) else self._logits[chosen], count + 1)
        weights = torch.exp((values[:, :count].double() - self._highest[chosen]) / self._temperature[chosen])
        is_whole = top_k > 0
        weights = weights.masked_fill(is_whole & (torch.arange(count) >= top_k), 0.0)
        # Of what top-k leaves, or of all tokens.
        total = torch.where(is_whole, weights.sum(-1, keepdim=True), self._totals_of(rows))
        probabilities = weights / total
        cumulative = probabilities.cumsum(-1)
        most = torch.where(is_whole, top_k, count)
        kept = torch.minimum(((cumulative - probabilities) < top_p).sum(-1, keepdim=True), most)
        is_open = (kept == count) & ~is_whole  # what is kept, and how much of it, goes on behind `count`
        mass = torch.where(is_open, 1.0, cumulative.gather(-1, kept - 1))
        target = _column([uniform(draw.params.seed, draw.sample_index, draw.token_index) for draw in draws])
        index = torch.searchsorted(cumulative, target * mass, right=True)
        is_undecided = is_open & ((top_p < 1.0) | (index >= kept))
        index = torch.minimum(index, kept - 1)
        # Of tokens that are as likely the smaller id comes first, which only `sample` sees to.
        drawn, before, after = (values.gather(-1, i) for i in (index, (index - 1).clamp_min(0), index + 1))
        is_tied = (drawn == after) | ((drawn == before) & (index > 0))
        unsure = (is_undecided | is_tied)[:, 0].tolist()
        return [
            None if skip else token for token, skip in zip(ids.gather(-1, index)[:, 0].tolist(), unsure, strict=True)
        ]

    def _totals_of(self, rows: Sequence[int]) -> Tensor:
        """Weights of all tokens [len(rows), 1]; 1 for rows with top-k, which have no use for it."""
        missing = [row for row in rows if row not in self._totals and not self._draws[row].params.top_k]
        step = max(1, IN_CACHE // self._logits.shape[-1])
        for start in range(0, len(missing), step):
            some = missing[start : start + step]
            chosen = torch.tensor(some)
            weights = self._logits[chosen].double().sub_(self._highest[chosen]).div_(self._temperature[chosen]).exp_()
            self._totals.update(zip(some, weights.sum(-1).tolist(), strict=True))
        return _column([self._totals.get(row, 1.0) for row in rows])


def _column(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)[:, None]
