"""The baseline outside this system: transformers' own decode step, in whatever process this is."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from spolia_bench.shared.pairs import Step


class TransformersDecode:
    """SDPA, float32, a `DynamicCache` that holds the prefix once for every row: transformers shares nothing."""

    def __init__(self, model: Any, num_rows: int, prefix_tokens: int) -> None:
        """The cache is filled with random numbers, as the batches' memory is."""
        self._model = model
        self._num_rows = num_rows
        model.set_attn_implementation("sdpa")
        config = model.config
        size = (num_rows, config.num_key_value_heads, prefix_tokens, config.hidden_size // config.num_attention_heads)
        self._cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            one = torch.randn(1, *size[1:])
            self._cache.update(one.expand(size).contiguous(), one.expand(size).contiguous(), layer)

    @torch.inference_mode()
    def _run(self) -> torch.Tensor:
        tokens = torch.ones(self._num_rows, 1, dtype=torch.int64)
        logits: torch.Tensor = self._model(tokens, past_key_values=self._cache, use_cache=True).logits
        return logits

    def step(self) -> Step:
        """One decode step of all rows, behind those before it."""
        return self._run
