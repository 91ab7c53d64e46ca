"""What drawing a token a row costs, beside reading the logits once: as every request may ask for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from spolia_bench.gpu.batches import DEVICE
from spolia_bench.gpu.rates import Rates
from spolia_bench.gpu.timing import figures, graphed, timed
from spolia_kernels.sample import Drawn, Draws, sample_rows

VOCABS = (128_256, 32_016)
ROWS = (1, 32, 256)
WAYS = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "top_k": {"temperature": 1.0, "top_k": 40},
    "top_p": {"temperature": 1.0, "top_p": 0.9},
}
"""Parameters of all rows, by the fields of `Draws`."""
SPREADS = ("flat", "sure")
"""How a row's logits lie: as random weights give them, so that a draw may come from anywhere; or with nearly all of the
probability on a few dozen tokens, as a trained model's."""


def compare(rates: Rates, vocabs: Sequence[int] = VOCABS, rows: Sequence[int] = ROWS) -> Iterator[dict[str, Any]]:
    """A row of figures per vocabulary, spread and batch; bfloat16."""
    for vocab, spread in product(vocabs, SPREADS):
        for count in rows:
            logits = spread_logits(count, vocab, spread).to(DEVICE, torch.bfloat16)
            into = Drawn.zeros(count, DEVICE)
            num_rows = torch.tensor([count], dtype=torch.int32, device=DEVICE)
            row: dict[str, Any] = {
                "vocab": vocab,
                "spread": spread,
                "rows": count,
                "floor_ms": rates.floor_ms(2.0 * count * vocab, 0.0),
            }
            for name, params in WAYS.items():
                draws = Draws.greedy(count, DEVICE)
                draws.sample_index.copy_(torch.arange(count))
                for parameter, value in params.items():
                    getattr(draws, parameter).fill_(value)
                draw = partial(sample_rows, logits, draws, into=into, num_rows=num_rows)
                row |= figures(name, timed(graphed(draw), repeats=10))
            yield row


def spread_logits(rows: int, vocab: int, spread: str, seed: int = 0) -> torch.Tensor:
    """Logits [rows, vocab], float32, that lie as one of `SPREADS`: normal, and some tokens' raised in a sure row."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    if spread == "sure":
        likely = torch.randint(0, vocab, (rows, 32), generator=generator)
        logits.scatter_add_(1, likely, 15 + 3 * torch.rand(rows, 32, generator=generator))
    return logits
