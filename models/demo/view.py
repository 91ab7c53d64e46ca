"""Who sees whom in a training step, computed in plain products: faster on a CPU than the fused kernel."""

from __future__ import annotations

import torch
from torch import Tensor

_STRIP = 256  # rows of queries at a time: what lies behind them is not computed, and scores stay in cache
_HIDDEN = -1e4


class View:
    """Streams are causal. Each of a row's `num_tails` tails sees the row's stream and, causally, itself."""

    def __init__(self, stream_tokens: int, lengths: Tensor, num_tails: int, dtype: torch.dtype) -> None:
        """lengths: int64 [rows], tokens of each stream that are no padding."""
        self._tokens = stream_tokens
        self._num_tails = num_tails
        strip = min(_STRIP, stream_tokens)
        self._strip = strip
        self._triangle = _causal(strip, dtype)
        padding = torch.arange(stream_tokens)[None] >= lengths[:, None]
        self._padding = torch.zeros(padding.shape, dtype=dtype).masked_fill_(padding, _HIDDEN)[:, None, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention; all [rows, heads, places, head_dim], streams first, then tails one after another."""
        q = q * q.shape[-1] ** -0.5
        n = self._tokens
        out = [self._stream(q[:, :, :n], k[:, :, :n], v[:, :, :n])]
        if self._num_tails:
            out.append(self._tails(q[:, :, n:], k, v))
        return torch.cat(out, 2)

    def _stream(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = []
        for start in range(0, self._tokens, self._strip):
            end = min(start + self._strip, self._tokens)
            scores = q[:, :, start:end] @ k[:, :, :end].transpose(-1, -2)
            scores[..., start:] += self._triangle[: end - start, : end - start]
            out.append(scores.softmax(-1) @ v[:, :, :end])
        return torch.cat(out, 2)

    def _tails(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, heads, places, width = q.shape
        n, tails = self._tokens, self._num_tails
        apart = (rows, heads, tails, places // tails, width)
        own_k, own_v = (x[:, :, n:].reshape(apart) for x in (k, v))
        stream = q @ k[:, :, :n].transpose(-1, -2) + self._padding
        own = q.reshape(apart) @ own_k.transpose(-1, -2) + _causal(apart[3], q.dtype)
        scores = torch.cat([stream, own.flatten(2, 3)], -1).softmax(-1)
        mixed = scores[..., n:].unflatten(2, apart[2:4]) @ own_v
        return scores[..., :n] @ v[:, :, :n] + mixed.flatten(2, 3)


def _causal(size: int, dtype: torch.dtype) -> Tensor:
    return torch.full((size, size), _HIDDEN, dtype=dtype).triu(1)
