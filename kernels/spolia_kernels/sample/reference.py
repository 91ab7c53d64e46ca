"""Drawing tokens in plain torch: sorts a vocabulary, adds it up, looks where the number falls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from spolia_core.sampling import uniform


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """How each row draws. One device; [num_rows] each."""

    temperature: Tensor
    """float64; 0 is greedy."""
    top_p: Tensor
    """float64; 1 keeps all."""
    top_k: Tensor
    """int32; 0 keeps all."""
    seed: Tensor
    """int64: the 64 bits of an unsigned seed."""
    sample_index: Tensor
    """int64."""
    token_index: Tensor
    """int64: which token of its answer the row draws."""

    @classmethod
    def greedy(cls, num_rows: int, device: torch.device | str = "cpu") -> Self:
        """Every row takes its likeliest token."""

        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(num_rows, dtype=dtype, device=device)

        wide = torch.int64
        top_p = torch.ones(num_rows, dtype=torch.float64, device=device)
        return cls(zeros(torch.float64), top_p, zeros(torch.int32), zeros(wide), zeros(wide), zeros(wide))


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """What was drawn, [num_rows] each."""

    token_ids: Tensor
    """int64; -1 where the row's logits are not numbers, or allow no token."""
    logprobs: Tensor
    """float32: natural logarithm of the token's own probability, before temperature, top-k and top-p."""

    @classmethod
    def zeros(cls, num_rows: int, device: torch.device | str = "cpu") -> Self:
        """Room for so many rows."""
        token_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        return cls(token_ids, torch.zeros(num_rows, dtype=torch.float32, device=device))


def sample_ref(logits: Tensor, draws: Draws) -> Drawn:
    """Computes `sample_rows` row by row; see there."""
    drawn = Drawn.zeros(logits.shape[0], logits.device)
    for row, line in enumerate(logits.float()):
        token_id = _draw(line, draws, row)
        drawn.token_ids[row] = token_id
        drawn.logprobs[row] = torch.log_softmax(line, -1)[token_id] if token_id >= 0 else torch.nan
    return drawn


def _draw(line: Tensor, draws: Draws, row: int) -> int:
    if not bool(line.max().isfinite()):  # NaN counts as the largest
        return -1
    # Stable: of equal logits the smaller id comes first.
    values, ids = torch.sort(line, descending=True, stable=True)
    temperature = float(draws.temperature[row])
    if temperature == 0.0:
        return int(ids[0])
    weights = torch.exp((values.double() - values[0].double()) / temperature)
    weights = weights[: int(draws.top_k[row]) or len(weights)]
    before = torch.cumsum(weights, -1) - weights
    top_p = float(draws.top_p[row])
    if top_p < 1.0:
        weights = weights[before < top_p * weights.sum()]
    seed = int(draws.seed[row]) % 2**64
    target = uniform(seed, int(draws.sample_index[row]), int(draws.token_index[row]))
    cumulative = torch.cumsum(weights, -1)
    index = int(torch.searchsorted(cumulative, target * cumulative[-1:], right=True))
    return int(ids[min(index, int((weights > 0).sum()) - 1)])
