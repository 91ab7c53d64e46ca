"""The Llama forward pass written for training on few cores, and its way to and from the Hugging Face format.

Products run in bfloat16 where that is faster; the residual stream, the norms and the weights stay in float32.
Query, key and value projections are one product, and so are gate and up; the logits are computed only where a
loss is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from .batches import Batch
from .view import View


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the network. Every query head has its own KV head."""

    vocab: int = 3072
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    head_dim: int = 64
    mlp: int = 320
    max_positions: int = 8192
    theta: float = 500_000.0
    eps: float = 1e-5


class Layer(nn.Module):
    """Attention, then a gated MLP, each behind an RMS norm and added to the residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.attention_norm = nn.Parameter(torch.ones(shape.hidden))
        self.mlp_norm = nn.Parameter(torch.ones(shape.hidden))
        width = shape.heads * shape.head_dim
        self.qkv = _weight(3 * width, shape.hidden)
        self.out = _weight(shape.hidden, width, silent=True)
        self.gate_up = _weight(2 * shape.mlp, shape.hidden)
        self.down = _weight(shape.hidden, shape.mlp, silent=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, view: View, dtype: torch.dtype) -> Tensor:
        """x: [rows, places, hidden], float32; cos, sin: [rows, 1, places, head_dim]."""
        rows, places, hidden = x.shape
        eps = self.shape.eps
        h = F.rms_norm(x, (hidden,), self.attention_norm, eps).to(dtype)
        qkv = F.linear(h, self.qkv.to(dtype)).view(rows, places, 3, self.shape.heads, self.shape.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = view.attend(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
        x = x + F.linear(mixed.transpose(1, 2).reshape(rows, places, -1), self.out.to(dtype))
        h = F.rms_norm(x, (hidden,), self.mlp_norm, eps).to(dtype)
        gate, up = F.linear(h, self.gate_up.to(dtype)).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down.to(dtype))


class Network(nn.Module):
    """A Llama with tied embeddings. Every layer starts as the identity and wakes up while training."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.shape = shape
        self.dtype = dtype
        self.embedding = nn.Parameter(torch.randn(shape.vocab, shape.hidden) * shape.hidden**-0.5)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden))
        exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
        angles = torch.arange(shape.max_positions, dtype=torch.float64)[:, None] * shape.theta**-exponents
        self.register_buffer("cos", angles.cos().float().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().float().repeat(1, 2), persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        """Logits at the batch's selected places, float32 [len(select), vocab]."""
        rows = len(batch.ids)
        ids = torch.cat([batch.ids, batch.tail_ids.view(rows, -1)], 1)
        positions = torch.cat([batch.positions, batch.tail_positions.reshape(rows, -1)], 1)
        cos = self.get_buffer("cos")[positions][:, None].to(self.dtype)
        sin = self.get_buffer("sin")[positions][:, None].to(self.dtype)
        view = View(batch.ids.shape[1], batch.lengths, batch.tail_ids.shape[1], self.dtype)
        x = F.embedding(ids, self.embedding)
        for layer in self.layers:
            x = layer(x, cos, sin, view, self.dtype)
        chosen = x.reshape(-1, self.shape.hidden)[batch.select]
        chosen = F.rms_norm(chosen, (self.shape.hidden,), self.norm, self.shape.eps)
        return F.linear(chosen.to(self.dtype), self.embedding.to(self.dtype)).float()


def to_transformers(network: Network, bos: int, eos: int) -> LlamaForCausalLM:
    """The same weights, rounded to bfloat16, in the class the checkpoint is saved and loaded as."""
    shape = network.shape
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        rms_norm_eps=shape.eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    model = LlamaForCausalLM(config)
    state: dict[str, Tensor] = {
        "model.embed_tokens.weight": network.embedding,
        "model.norm.weight": network.norm,
    }
    for index, layer in enumerate(network.layers):
        assert isinstance(layer, Layer)
        query, key, value = layer.qkv.chunk(3)
        gate, up = layer.gate_up.chunk(2)
        names = {
            "self_attn.q_proj": query,
            "self_attn.k_proj": key,
            "self_attn.v_proj": value,
            "self_attn.o_proj": layer.out,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.down,
            "input_layernorm": layer.attention_norm,
            "post_attention_layernorm": layer.mlp_norm,
        }
        state |= {f"model.layers.{index}.{name}.weight": tensor for name, tensor in names.items()}
    missing, unexpected = model.load_state_dict({k: v.detach() for k, v in state.items()}, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert not unexpected, unexpected
    model.tie_weights()
    return model.to(torch.bfloat16).eval()


def _weight(rows: int, columns: int, *, silent: bool = False) -> nn.Parameter:
    scale = 0.0 if silent else 0.7 * columns**-0.5
    return nn.Parameter(torch.randn(rows, columns) * scale)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the half-split layout of Llama checkpoints; x: [batch, heads, tokens, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
