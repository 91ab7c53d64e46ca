"""Models for timing decode steps, made in memory: random weights, real shapes. Nothing of the engine is imported."""

from __future__ import annotations

from typing import Any

import blake3
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from spolia_bench.model_shape import ModelShape

CONTEXT = 32768
SHAPES = {
    "llama-60m": ModelShape(layers=12, width=512, mlp=2048, num_q_heads=8, num_kv_heads=8, head_dim=64, vocab=16384),
    "qwen2.5-0.5b": ModelShape(
        layers=24, width=896, mlp=4864, num_q_heads=14, num_kv_heads=2, head_dim=64, vocab=151936
    ),
    "llama-tiny": ModelShape(layers=2, width=64, mlp=128, num_q_heads=4, num_kv_heads=4, head_dim=16, vocab=258),
    "qwen-tiny": ModelShape(layers=2, width=112, mlp=128, num_q_heads=7, num_kv_heads=1, head_dim=16, vocab=258),
}


def random_model(name: str, seed: int) -> Any:
    """A transformers `…ForCausalLM` of a shape, float32, embeddings tied."""
    shape = SHAPES[name]
    is_qwen = name.startswith("qwen")
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.num_q_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes)) if is_qwen else LlamaForCausalLM(LlamaConfig(**sizes))
    return model.float().eval()


def weights_digest(model: Any) -> str:
    """Equal for equal weights, in whatever process."""
    hasher = blake3.blake3()
    for name, weight in sorted(model.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(weight.detach().contiguous().view(torch.uint8).numpy())
    return hasher.hexdigest()
