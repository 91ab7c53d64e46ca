"""Models for timing: the shape is real, the weights are random and the same everywhere."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

CACHE = Path(".spolia/models")


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama shape; head size is `width` / `heads`."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    context: int = 32768


LLAMA_60M = Shape("llama-60m-random", layers=12, width=512, heads=8, kv_heads=8, mlp=2048)
LLAMA_8M = Shape("llama-8m-random", layers=6, width=256, heads=4, kv_heads=4, mlp=1024)
LLAMA_TINY = Shape("llama-tiny-random", layers=2, width=64, heads=4, kv_heads=2, mlp=128)
SHAPES = {shape.name: shape for shape in (LLAMA_60M, LLAMA_8M, LLAMA_TINY)}


def random_model(shape: Shape, seed: int, cache: Path = CACHE) -> Path:
    """A model directory with random float32 weights and a byte-level tokenizer; made once, then found again."""
    path = cache / f"{shape.name}-{seed}"
    if not (path / "tokenizer.json").is_file():
        building = path.with_suffix(".building")
        shutil.rmtree(building, ignore_errors=True)
        random_weights(shape, seed, vocab_size=258, bos_id=256, eos_id=257).save_pretrained(building)
        _byte_tokenizer().save(str(building / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "add_bos_token": True,
        }
        (building / "tokenizer_config.json").write_text(json.dumps(settings))
        shutil.rmtree(path, ignore_errors=True)
        building.rename(path)
    return path


def random_weights(shape: Shape, seed: int, *, vocab_size: int, bos_id: int, eos_id: int) -> LlamaForCausalLM:
    """The model of a shape, float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
    )
    return LlamaForCausalLM(config)


def _byte_tokenizer() -> Tokenizer:
    """One token per byte, so that lengths in tokens are lengths in bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer
