"""The model's layers as we run them: Llama and its kin (Mistral, Qwen2, Qwen3).

Taken from transformers' modules once, at load: Q, K and V become one product, so do gate and up, and every weight is
laid out for this device (`spolia_kernels.linear`). transformers' own modules would do, and did; but they read weights
in a layout that is slow for few rows (`docs/decode.md`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from spolia_kernels import NOT_MEASURED, Linear, Rotation, measured_few_rows
from spolia_kernels.fused import RmsNorm, silu_mul

_MEASURED_FROM_BYTES = 16 << 20


class LayerAttention(Protocol):
    """Attention of one layer of a pass, and where its KV goes.

    `query` [num_q_heads, num_rows, head_dim], `key` [num_kv_heads, num_rows, head_dim] (both rotated to the rows'
    positions) and `value` [num_kv_heads, num_rows, v_dim] of the rows; returns [num_q_heads, num_rows, v_dim].
    """

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Tensor:
        """Writes the rows' KV and attends."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class QueryKeyValue:
    """What a layer hands to attention; shapes as in `LayerAttention`."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DecoderLayer:
    """One layer: attention and MLP, each behind a norm, each added to what came in."""

    index: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    sm_scale: float
    input_norm: RmsNorm
    qkv: Linear
    query_norm: RmsNorm | None
    key_norm: RmsNorm | None
    out: Linear
    mlp_norm: RmsNorm
    gate_up: Linear
    down: Linear
    gated: Callable[[Tensor], Tensor]
    """Gate and up, side by side in rows [num_rows, 2 · mlp_width], become what `down` takes, [num_rows, mlp_width]."""

    @classmethod
    def of(cls, module: Any, config: Any, index: int) -> DecoderLayer:
        """From one of transformers' decoder layers. Copies what it packs; the module is not kept."""
        attention, mlp = module.self_attn, module.mlp
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        query_norm, key_norm = (None if norm is None else _norm_of(norm) for norm in norms)
        return cls(
            index=index,
            num_q_heads=int(config.num_attention_heads),
            num_kv_heads=int(config.num_key_value_heads),
            head_dim=int(attention.head_dim),
            sm_scale=float(attention.scaling),
            input_norm=_norm_of(module.input_layernorm),
            qkv=_joined(attention.q_proj, attention.k_proj, attention.v_proj),
            query_norm=query_norm,
            key_norm=key_norm,
            out=_joined(attention.o_proj),
            mlp_norm=_norm_of(module.post_attention_layernorm),
            gate_up=_joined(mlp.gate_proj, mlp.up_proj),
            down=_joined(mlp.down_proj),
            gated=silu_mul if config.hidden_act == "silu" else partial(_gated, mlp.act_fn),
        )

    def project(self, hidden: Tensor, rotation: Rotation) -> QueryKeyValue:
        """Queries, keys and values of hidden states [num_rows, width]; `rotation` is that of their positions."""
        num_rows, num_q, num_kv = hidden.shape[0], self.num_q_heads, self.num_kv_heads
        heads = self.qkv(self.input_norm(hidden)).view(num_rows, num_q + 2 * num_kv, self.head_dim)
        rotated = heads[:, : num_q + num_kv]
        if self.query_norm is not None and self.key_norm is not None:
            rotated = torch.cat((self.query_norm(heads[:, :num_q]), self.key_norm(heads[:, num_q : num_q + num_kv])), 1)
        turned = rotation(rotated.transpose(0, 1))
        return QueryKeyValue(turned[:num_q], turned[num_q:], heads[:, num_q + num_kv :].transpose(0, 1))

    def __call__(self, hidden: Tensor, rotation: Rotation, attention: LayerAttention) -> Tensor:
        """Hidden states [num_rows, width] behind the layer; `hidden` is left unchanged."""
        projected = self.project(hidden, rotation)
        seen = attention(self.index, projected.query, projected.key, projected.value, self.sm_scale)
        hidden = self.out.added_to(hidden, seen.transpose(0, 1).reshape(hidden.shape[0], -1))
        return self.down.added_to(hidden, self.gated(self.gate_up(self.mlp_norm(hidden))))


@dataclass(frozen=True, slots=True, eq=False)
class Decoder:
    """Embedding, layers, last norm and head of a causal language model."""

    embedding: Tensor
    layers: tuple[DecoderLayer, ...]
    norm: RmsNorm
    head: Linear

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, *, takes_weights: bool = False) -> Decoder:
        """From a transformers `…ForCausalLM` in its final dtype and on its device.

        `takes_weights`: the model is of no use afterwards. Its layers go one by one, so that packing copies of them
        never takes more memory than one layer.
        """
        inner = model.model
        layers: list[DecoderLayer] = []
        for index, module in enumerate(inner.layers):
            layers.append(DecoderLayer.of(module, model.config, index))
            if takes_weights:
                module.to("meta")
        embedding, head = inner.embed_tokens.weight.detach(), model.lm_head.weight
        is_tied = head.data_ptr() == embedding.data_ptr()
        return cls(embedding, tuple(layers), _norm_of(inner.norm), _head(head, model.lm_head.bias, is_tied))


def _norm_of(module: Any) -> RmsNorm:
    """From any of transformers' RMSNorm modules."""
    return RmsNorm.of(module.weight.detach(), float(module.variance_epsilon))


def _gated(activation: Callable[[Tensor], Tensor], gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return activation(gate).mul_(up)


def _head(weight: Tensor, bias: Tensor | None, is_tied: bool) -> Linear:
    """The product with an embedding table that it shares is measured where that is too large for a cache."""
    num_bytes = weight.numel() * weight.element_size()
    is_measured = is_tied and weight.device.type == "cpu" and num_bytes >= _MEASURED_FROM_BYTES
    few_rows = measured_few_rows() if is_measured else NOT_MEASURED
    return Linear.of(weight, bias, shared=is_tied, few_rows=few_rows)


def _joined(*modules: Any) -> Linear:
    """Products of the same rows as one: outputs side by side."""
    if len(modules) == 1:
        return Linear.of(modules[0].weight, modules[0].bias)
    biases = [module.bias for module in modules if module.bias is not None]
    weight = torch.cat([module.weight for module in modules])
    return Linear.of(weight, torch.cat(biases) if biases else None)
