"""Causal attention of rows of many sequences, those of like length side by side as one dense product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from spolia_kernels import Partial, attend


class SideBySide:
    """Attends the rows of each sequence over themselves. Sequences come one after the other, the shortest first."""

    def __init__(self, lens: Sequence[int], device: torch.device) -> None:
        """`lens`: rows of each sequence, at least one, ascending."""
        self._batches = list(_batches(lens, device))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Partial:
        """Of query [num_q_heads, num_rows, head_dim]: each row sees the rows of its sequence at or before it."""
        parts = [batch.attend(query, key, value, sm_scale) for batch in self._batches]
        if len(parts) == 1:
            return parts[0]
        return Partial(torch.cat([p.out for p in parts], 1), torch.cat([p.lse for p in parts], 1))


class _Batch:
    """Neighbouring sequences of similar length, padded at their ends to the longest, as one dense causal product.

    No mask is needed: a row sees only rows before it, and padding comes last. Sequences become heads: query head h of
    sequence t is head t * num_q_heads + h, and so reads KV head t * num_kv_heads + h // group_size, which is its own.
    """

    def __init__(self, first_row: int, lens: Sequence[int], device: torch.device) -> None:
        self._rows = slice(first_row, first_row + sum(lens))
        self._num_sequences, self._longest = len(lens), lens[-1]
        self._padded: Tensor | None = None
        if lens[0] != lens[-1]:
            counts = torch.tensor(lens)
            column = torch.arange(self._longest)
            ends = counts.cumsum(0)[:, None]
            # Padding repeats a sequence's last row: any finite numbers do.
            padded = torch.minimum(ends - counts[:, None] + column, ends - 1)
            self._padded = padded.flatten().to(device)
            self._real = (column < counts[:, None]).flatten().nonzero()[:, 0].to(device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Partial:
        """Causal attention of each sequence's rows over themselves, the rows in the order they came."""
        part = attend(self._pad(query), self._pad(key), self._pad(value), sm_scale=sm_scale, causal=True)
        return Partial(self._unpad(part.out), self._unpad(part.lse))

    def _pad(self, x: Tensor) -> Tensor:
        """[num_heads, num_rows, dim] of the pass to [num_sequences * num_heads, longest, dim]."""
        own = x[:, self._rows]
        if self._padded is not None:
            own = own.index_select(1, self._padded)
        split = own.view(own.shape[0], self._num_sequences, self._longest, -1)
        return split.transpose(0, 1).flatten(0, 1)

    def _unpad(self, x: Tensor) -> Tensor:
        """[num_sequences * num_q_heads, longest, …] back to [num_q_heads, num_rows, …]."""
        own = x.view(self._num_sequences, -1, *x.shape[1:]).transpose(0, 1).flatten(1, 2)
        return own if self._padded is None else own.index_select(1, self._real)


def _batches(lens: Sequence[int], device: torch.device) -> Iterator[_Batch]:
    """Sequences whose lengths have as many bits share a batch: padding less than doubles the rows."""
    first_row = 0
    for _, neighbours in groupby(lens, key=int.bit_length):
        batch = list(neighbours)
        yield _Batch(first_row, batch, device)
        first_row += sum(batch)
