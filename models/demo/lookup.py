"""A start from which looking up is learned in minutes: the first layers are set to an induction circuit.

Left to chance, a small network finds out after hundreds of steps, or never, that a head may look at the token
before and another one may search for it. Here layer 0 starts with heads that look a fixed distance back,
layer 1 with heads that search for the present token among those remembered ones and copy what they find.
Training is free to change all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .network import Layer, Network

# Embedding column 0 is the same for every token: a constant from which heads can make a preference for a
# distance.
_CONSTANT = 0.7
_SHARP = range(0, 8)  # rotary pairs that tell neighbouring distances apart
_BROAD = range(4, 11)  # rotary pairs that tell near from far
_SLOW_FROM = 14  # rotary pairs from here on hardly turn within a few hundred tokens, so they can compare content
# Gains that keep every part of the residual stream of like size: norms bring a token to length sqrt(hidden).
_REMEMBER = 0.1
_REMEMBER_MANY = 0.3
_SHARPNESS = 2.5
_SHARPNESS_MANY = 4.0
_COPY = 0.5


def prepare_lookup(network: Network) -> None:
    """Overwrites the embedding's first column and the attention weights of the first two layers."""
    first, second = network.layers[0], network.layers[1]
    assert isinstance(first, Layer)
    assert isinstance(second, Layer)
    assert network.shape.heads == 4
    with torch.no_grad():
        network.embedding[:, 0] = _CONSTANT
        previous = _look_back(first, 0, 1, _SHARP, 1.0, _REMEMBER)
        _look_back(first, 1, 2, _SHARP, 1.0, _REMEMBER)
        around = _look_back(first, 2, 5, _BROAD, 0.45, _REMEMBER_MANY)
        _look_back(first, 3, 9, _BROAD, 0.45, _REMEMBER_MANY)
        for half, basis in enumerate(_orthogonal(network.shape.hidden).chunk(2)):
            _search(second, half, previous.reads, previous.writes, basis, _SHARPNESS)
            _search(second, 2 + half, around.writes, around.writes, basis, _SHARPNESS_MANY)


@dataclass(frozen=True, slots=True)
class _Memory:
    """What a head reads and where it writes, each [head_dim, hidden]."""

    reads: Tensor
    writes: Tensor


def _look_back(layer: Layer, head: int, distance: int, pairs: range, strength: float, gain: float) -> _Memory:
    """Makes a head prefer one distance and remember what is there."""
    shape = layer.shape
    query, key, value = _head_rows(layer, head)
    query.zero_()
    key.zero_()
    half = shape.head_dim // 2
    for pair in pairs:
        angle = torch.tensor(distance * shape.theta ** (-pair / half))
        query[pair, 0] = strength
        key[pair, 0] = strength * angle.cos()
        key[pair + half, 0] = strength * angle.sin()
    reads = _orthogonal(shape.hidden)[: shape.head_dim]
    writes = _orthogonal(shape.hidden)[: shape.head_dim]
    value.copy_(reads)
    _head_columns(layer, head).copy_(gain * writes.T)
    return _Memory(reads, writes)


def _search(layer: Layer, head: int, wanted: Tensor, known: Tensor, basis: Tensor, sharpness: float) -> None:
    """Makes a head go where `known` reads what `wanted` reads here, and copy a part of what is there."""
    query, key, value = _head_rows(layer, head)
    query.zero_()
    key.zero_()
    half = layer.shape.head_dim // 2
    slow = [*range(_SLOW_FROM, half), *range(_SLOW_FROM + half, 2 * half)]
    query[slow] = sharpness * wanted[: len(slow)]
    key[slow] = sharpness * known[: len(slow)]
    value.zero_()
    value[: len(basis)] = basis
    _head_columns(layer, head)[:, : len(basis)] = _COPY * basis.T


def _head_rows(layer: Layer, head: int) -> tuple[Tensor, Tensor, Tensor]:
    width = layer.shape.head_dim
    query, key, value = layer.qkv.view(3, layer.shape.heads, width, layer.shape.hidden)[:, head]
    return query, key, value


def _head_columns(layer: Layer, head: int) -> Tensor:
    width = layer.shape.head_dim
    columns: Tensor = layer.out[:, head * width : (head + 1) * width]
    return columns


def _orthogonal(size: int) -> Tensor:
    """A random orthonormal basis that does not see the constant column."""
    basis: Tensor = torch.linalg.qr(torch.randn(size, size)).Q
    basis[:, 0] = 0
    return basis
