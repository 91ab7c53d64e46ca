"""A slow, dense oracle for the link pass, made of the model's own modules and nothing of ours.

Law 1 says what linking is: the chunks' keys, computed alone at local positions, explicitly re-rotated to where they
stand, lie in a dense cache, and the model runs over R with the mask that a causal model would have. Every step here is
dense and in float64 where angles are concerned: frequencies, rotations and masks are worked out anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from spolia_core.prompt import Prompt


def cos_sin(model: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [n, head_dim] in float64, temperature left out."""
    angles = torch.outer(positions.double(), model.model.rotary_emb.inv_freq.double())
    both = torch.cat((angles, angles), -1)
    return both.cos(), both.sin()


def embeddings(model: Any, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the model's layers take as `position_embeddings`, with angles in float64."""
    scaling = model.model.rotary_emb.attention_scaling
    cos, sin = ((part * scaling).to(dtype)[None] for part in cos_sin(model, positions))
    return cos, sin


def rotate_keys(model: Any, keys: Tensor, by: int) -> Tensor:
    """Keys [..., n, head_dim] turned on by `by` positions: a pure rotation, in float64."""
    cos, sin = cos_sin(model, torch.tensor([by]))
    wide = keys.double()
    half = wide.shape[-1] // 2
    turned = torch.cat((-wide[..., half:], wide[..., :half]), -1)
    return (wide * cos + turned * sin).to(keys.dtype)


@torch.no_grad()
def run_layers(
    model: Any, token_ids: Sequence[int], positions: Sequence[int], mask: Tensor, cache: DynamicCache
) -> tuple[Tensor, DynamicCache]:
    """Logits [num_rows, vocab_size] of rows over what `cache` holds and themselves; `mask` is additive."""
    hidden = model.model.embed_tokens(torch.tensor([list(token_ids)]))
    rope = embeddings(model, torch.tensor(list(positions)), hidden.dtype)
    for layer in model.model.layers:
        hidden = layer(hidden, attention_mask=mask.to(hidden.dtype), past_key_values=cache, position_embeddings=rope)
    return model.lm_head(model.model.norm(hidden))[0], cache


def causal(seen: Tensor) -> Tensor:
    """Additive mask [1, 1, rows, keys] of a boolean one."""
    return torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]


@dataclass
class Linked:
    """Logits of the rows of R, and the dense cache over all positions, sorted by position."""

    logits: Tensor
    cache: DynamicCache


def dense_forward(model: Any, token_ids: Sequence[int]) -> Tensor:
    """Full recompute: logits of all tokens, with float64 angles."""
    count = len(token_ids)
    seen = torch.ones(count, count, dtype=torch.bool).tril()
    return run_layers(model, token_ids, range(count), causal(seen), DynamicCache())[0]


def chunk_kv(model: Any, token_ids: Sequence[int], sinks: Sequence[int] = ()) -> list[tuple[Tensor, Tensor]]:
    """(K, V) of each layer of a chunk computed alone at positions 0, 1, 2, ….

    With `sinks`, they are computed before it, from position 0 on; then they are cut off, and the chunk's keys turned
    back by their number. The adapter never sees a positive position of this kind, the oracle never a negative one.
    """
    ids, first = [*sinks, *token_ids], len(sinks)
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    _, cache = run_layers(model, ids, range(len(ids)), causal(seen), DynamicCache())
    return [
        (rotate_keys(model, layer.keys[:, :, first:], -first), layer.values[:, :, first:]) for layer in cache.layers
    ]


def link(model: Any, prompt: Prompt, recomputed: Sequence[int], sinks: Sequence[int] = ()) -> Linked:
    """Law 1, literally. `recomputed` holds R as sorted positions; every other token belongs to a chunk.

    Chunks were compiled behind `sinks`, dummy token ids.
    """
    rows = set(recomputed)
    reused = [p for p in range(prompt.num_tokens) if p not in rows]
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(_moved(model, prompt, rows, sinks)):
        cache.update(keys, values, layer)
    positions = torch.tensor([*reused, *recomputed])
    seen = positions[None, :] <= torch.tensor(list(recomputed))[:, None]
    tokens = prompt.token_ids
    logits, cache = run_layers(model, [tokens[p] for p in recomputed], recomputed, causal(seen), cache)
    order = torch.argsort(positions)
    for entry in cache.layers:
        entry.keys, entry.values = entry.keys[:, :, order], entry.values[:, :, order]
    return Linked(logits, cache)


def next_logits(model: Any, linked: Linked, position: int, token_id: int) -> Tensor:
    """Logits after one more token at `position`; the cache grows by it."""
    seen = torch.ones(1, position + 1, dtype=torch.bool)
    logits, linked.cache = run_layers(model, [token_id], [position], causal(seen), linked.cache)
    return logits[0]


def _moved(model: Any, prompt: Prompt, rows: set[int], sinks: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """(K, V) of each layer for all tokens outside `rows`, in order, keys re-rotated to their positions."""
    num_layers = len(model.model.layers)
    keys: list[list[Tensor]] = [[] for _ in range(num_layers)]
    values: list[list[Tensor]] = [[] for _ in range(num_layers)]
    base = 0
    for part in prompt.parts:
        kept = [i for i in range(len(part.token_ids)) if base + i not in rows]
        if kept:
            for layer, (k, v) in enumerate(chunk_kv(model, part.token_ids, sinks)):
                keys[layer].append(rotate_keys(model, k[:, :, kept], base))
                values[layer].append(v[:, :, kept])
        base += len(part.token_ids)
    return [(torch.cat(k, 2), torch.cat(v, 2)) for k, v in zip(keys, values, strict=True) if k]
