"""The sizes of a Llama-like model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes that decide what a pass costs; `item_bytes` of a number, 4 in float32."""

    layers: int
    width: int
    mlp: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    item_bytes: int = 4

    @classmethod
    def of(cls, model: Path) -> ModelShape:
        """Reads a model directory's config.json."""
        config = json.loads((model / "config.json").read_text())
        heads, width = config["num_attention_heads"], config["hidden_size"]
        return cls(
            layers=config["num_hidden_layers"],
            width=width,
            mlp=config["intermediate_size"],
            num_q_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or width // heads,
            vocab=config["vocab_size"],
        )
