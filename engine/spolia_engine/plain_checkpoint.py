"""Checkpoints of Llama and its kin that hold what their config says, read without transformers' classes of models.

Importing those classes brings torch's compiler and distributed tensors along: 1.4 s of processor time and 170 MiB of
every engine, for modules of which `model_layers` takes the weights alone. So a folder whose files have exactly the
weights that are expected is read into modules of the same names that only hold them. Any other is transformers' to
judge: it knows older names, and says what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from spolia_engine.model_configs import ACTIVATION

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"


class Rope:
    """Frequencies of a config's RoPE, and the factor that scales its rotations."""

    inv_freq: Tensor
    attention_scaling: float

    def __init__(self, config: Any) -> None:
        rope_type = config.rope_parameters["rope_type"]
        if rope_type == "default":
            powers = torch.arange(0, _head_dim(config), 2, dtype=torch.float) / _head_dim(config)
            self.inv_freq, self.attention_scaling = 1.0 / (config.rope_parameters["rope_theta"] ** powers), 1.0
        else:
            self.inv_freq, self.attention_scaling = ROPE_INIT_FUNCTIONS[rope_type](config)


class Product(nn.Module):
    """Weights of a matrix product, and of what is added to it."""

    def __init__(self, width: int, out_width: int, *, has_bias: bool = False) -> None:
        super().__init__()
        self.weight = _expected(out_width, width)
        self.bias = _expected(out_width) if has_bias else None


class Norm(nn.Module):
    """Weights of an RMSNorm."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = _expected(width)
        self.variance_epsilon = eps


class Attention(nn.Module):
    """Weights of a layer's attention."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.head_dim = _head_dim(config)
        self.scaling = self.head_dim**-0.5
        is_qwen2 = config.model_type == "qwen2"
        has_bias = is_qwen2 or bool(getattr(config, "attention_bias", False))
        width, q_width = config.hidden_size, config.num_attention_heads * self.head_dim
        kv_width = config.num_key_value_heads * self.head_dim
        self.q_proj = Product(width, q_width, has_bias=has_bias)
        self.k_proj = Product(width, kv_width, has_bias=has_bias)
        self.v_proj = Product(width, kv_width, has_bias=has_bias)
        self.o_proj = Product(q_width, width, has_bias=has_bias and not is_qwen2)
        if config.model_type == "qwen3":
            self.q_norm = Norm(self.head_dim, config.rms_norm_eps)
            self.k_norm = Norm(self.head_dim, config.rms_norm_eps)


class Mlp(nn.Module):
    """Weights of a layer's MLP."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        has_bias = bool(getattr(config, "mlp_bias", False))
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Product(width, inner, has_bias=has_bias)
        self.up_proj = Product(width, inner, has_bias=has_bias)
        self.down_proj = Product(inner, width, has_bias=has_bias)


class Layer(nn.Module):
    """Weights of a layer."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)


class Layers(nn.Module):
    """Weights of everything but the head."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed_tokens = Product(config.hidden_size, config.vocab_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = Rope(config)


@dataclass(frozen=True, slots=True)
class Generation:
    """What a folder says of answers, of that what is read here."""

    eos_token_id: int | list[int] | None


class PlainModel(nn.Module):
    """A causal language model's weights, by transformers' names; it computes nothing."""

    generation_config: Generation | None = None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.model = Layers(config)
        self.lm_head = Product(config.hidden_size, config.vocab_size)


def read_plain(path: Path, config: Any, dtype: torch.dtype) -> PlainModel | None:
    """The model of a folder in `dtype`, or None where its files do not hold exactly what `config` says.

    Raises what `safetensors` and `json` raise for files that cannot be read.
    """
    if config.hidden_act != ACTIVATION:
        return None
    model = PlainModel(config)
    expected = model.state_dict()
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    weights = _weights_as_expected(_files_by_name(path), expected, dtype)
    if weights is None:
        return None
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    if (path / GENERATION).is_file():
        model.generation_config = Generation(json.loads((path / GENERATION).read_bytes()).get("eos_token_id"))
    return model


def _weights_as_expected(
    file_of: Mapping[str, Path], expected: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor] | None:
    """Weights by name; None where names or shapes are others. Shapes are looked at before anything is read."""
    if file_of.keys() != expected.keys():
        return None
    with ExitStack() as opened:
        files = {file: opened.enter_context(safe_open(file, "pt")) for file in set(file_of.values())}
        for name, file in file_of.items():
            if files[file].get_slice(name).get_shape() != list(expected[name].shape):
                return None
        return {name: files[file].get_tensor(name).to(dtype) for name, file in file_of.items()}


def _files_by_name(path: Path) -> dict[str, Path]:
    """Where each weight is: in the one file, or where the index says; empty without either."""
    if (path / ONE_FILE).is_file():
        with safe_open(path / ONE_FILE, "pt") as file:
            return dict.fromkeys(file.keys(), path / ONE_FILE)
    if (path / INDEX).is_file():
        named: dict[str, str] = json.loads((path / INDEX).read_bytes())["weight_map"]
        return {name: path / file for name, file in named.items()}
    return {}


def _expected(*shape: int) -> nn.Parameter:
    """A weight that is read later: so far it has a shape and no memory."""
    return nn.Parameter(torch.empty(shape, device="meta"))


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
