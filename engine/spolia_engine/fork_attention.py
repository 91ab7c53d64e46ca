"""Attention of many tails behind one context: shared ranges once for all rows, tails of like length side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from spolia_engine.attention import VisibleRange, VisibleRanges
from spolia_engine.pool import Extent
from spolia_engine.run import SlotRange
from spolia_kernels import Partial, RotaryTable, attend


class ForkAttention:
    """Rows of several tails, tail after tail: each sees the shared ranges whole, and its own tail at or before it.

    `tails` are the extents the tails' KV goes to, each as long as its tail, shortest first. Every shared range is
    attended once with the rows of all tails, whatever its offset. Source: Hydragen (2402.05099) §3.1-3.2, here for
    rows of a prefill and for ranges that stand where they were not computed.
    """

    def __init__(self, tails: Sequence[Extent], shared: Sequence[SlotRange], rotary: RotaryTable) -> None:
        self._tails = tuple(tails)
        self._lens = [extent.capacity for extent in tails]
        self._batches = list(_batches(self._lens, rotary.device))
        self._shared = VisibleRanges((VisibleRange(slots, 0) for slots in shared), rotary)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Tensor:
        """Writes each tail's KV and returns the rows' attention, as `ContextAttention` does."""
        rows = zip(self._tails, torch.split(key, self._lens, 1), torch.split(value, self._lens, 1), strict=True)
        for extent, own_key, own_value in rows:
            extent.key[layer].copy_(own_key)
            extent.value[layer].copy_(own_value)
        parts = [batch.attend(query, key, value, sm_scale) for batch in self._batches]
        result = Partial(torch.cat([p.out for p in parts], 1), torch.cat([p.lse for p in parts], 1))
        self._shared.merge_into(result, query, layer, sm_scale)
        return result.out.to(query.dtype)


class _Batch:
    """Neighbouring tails of similar length, padded at their ends to the longest, as one dense causal product.

    No mask is needed: a row sees only rows before it, and padding comes last. Tails become heads: query head h of tail
    t is head t * num_q_heads + h, and so reads KV head t * num_kv_heads + h // group_size, which is its own.
    """

    def __init__(self, first_row: int, lens: Sequence[int], device: torch.device) -> None:
        self._rows = slice(first_row, first_row + sum(lens))
        self._num_tails, self._longest = len(lens), lens[-1]
        self._padded: Tensor | None = None
        if lens[0] != lens[-1]:
            counts = torch.tensor(lens)
            column = torch.arange(self._longest)
            ends = counts.cumsum(0)[:, None]
            # Padding repeats a tail's last row: any finite numbers do.
            padded = torch.minimum(ends - counts[:, None] + column, ends - 1)
            self._padded = padded.flatten().to(device)
            self._real = (column < counts[:, None]).flatten().nonzero()[:, 0].to(device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Partial:
        """Causal attention of each tail's rows over themselves, the rows in the order they came."""
        part = attend(self._pad(query), self._pad(key), self._pad(value), sm_scale=sm_scale, causal=True)
        return Partial(self._unpad(part.out), self._unpad(part.lse))

    def _pad(self, x: Tensor) -> Tensor:
        """[num_heads, num_rows, dim] of the pass to [num_tails * num_heads, longest, dim]."""
        own = x[:, self._rows]
        if self._padded is not None:
            own = own.index_select(1, self._padded)
        split = own.view(own.shape[0], self._num_tails, self._longest, -1)
        return split.transpose(0, 1).flatten(0, 1)

    def _unpad(self, x: Tensor) -> Tensor:
        """[num_tails * num_q_heads, longest, …] back to [num_q_heads, num_rows, …]."""
        own = x.view(self._num_tails, -1, *x.shape[1:]).transpose(0, 1).flatten(1, 2)
        return own if self._padded is None else own.index_select(1, self._real)


def _batches(lens: Sequence[int], device: torch.device) -> Iterator[_Batch]:
    """Tails whose lengths have as many bits share a batch: padding less than doubles the rows."""
    first_row = 0
    for _, neighbours in groupby(lens, key=int.bit_length):
        batch = list(neighbours)
        yield _Batch(first_row, batch, device)
        first_row += sum(batch)
