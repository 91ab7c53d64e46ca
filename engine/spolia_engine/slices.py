"""Slices of several passes through the model at once.

Thirty rows take nearly as long as sixty: the weights are read all the same. So what is short shares a pass: questions,
the link tokens of a prompt, small documents. 8 M parameters, one thread, ms for each slice alone and with others:

    rows of a slice   alone   2      4      8      16     together
    16                6.7     4.9    3.4    2.6    2.2
    30                8.7     6.7    5.1    4.2    3.9
    64                12.3    10.4   8.4    7.9    8.3
    128               19.4    17.5   16.3   17.1

With 60 M parameters and two threads the gain is as large (30 rows: 26.8 alone, 13.7 each of 8). A pass of some 256 rows
has all of it, and no slice is worse off: one that shares a turn of the engine with others was done when the turn ended.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from spolia_engine.adapter import ModelAdapter
from spolia_engine.side_by_side import SideBySide
from spolia_engine.steps import Ran, Slice, finish
from spolia_kernels import Partial


def run_slices(adapter: ModelAdapter, slices: Sequence[Slice]) -> list[Ran | BaseException]:
    """Runs slices of different sequences, at least one, and says of each what came of it.

    A slice whose `on_layer` raises goes no further for its caller, who gets what was raised; the others go on. What the
    model raises is everybody's. Seconds are shared by rows. Source: Orca (OSDI '22) §4, selective batching.
    """
    started = time.perf_counter()
    order = sorted(range(len(slices)), key=lambda i: slices[i].num_rows)
    try:
        joined = _Joined([slices[i] for i in order], adapter.device)
        hidden = joined.run(adapter)
    except BaseException as error:  # each caller's, whatever it is
        return [error for _ in slices]
    seconds = time.perf_counter() - started
    found: list[Ran | BaseException] = [Ran(hidden, 0.0) for _ in slices]
    for i, rows, raised in zip(order, joined.rows, joined.errors, strict=True):
        share = seconds * slices[i].num_rows / len(hidden)
        found[i] = Ran(hidden[rows], share) if raised is None else raised
    return found


class _Joined:
    """Rows of several slices, one slice after the other, the shortest first; and attention of a pass over them."""

    def __init__(self, slices: Sequence[Slice], device: torch.device) -> None:
        self._slices = slices
        self._lens = [each.num_rows for each in slices]
        ends = torch.tensor(self._lens).cumsum(0).tolist()
        self.rows = [slice(end - length, end) for end, length in zip(ends, self._lens, strict=True)]
        self.errors: list[BaseException | None] = [None] * len(slices)
        self._side_by_side = SideBySide(self._lens, device)

    def run(self, adapter: ModelAdapter) -> Tensor:
        """Hidden states of all rows."""
        if len(self._slices) == 1:
            (one,) = self._slices
            return finish(adapter.forward_steps(one.token_ids, one.positions, one.attention, one.on_layer))
        token_ids = list(chain.from_iterable(each.token_ids for each in self._slices))
        positions = list(chain.from_iterable(each.positions for each in self._slices))
        return finish(adapter.forward_steps(token_ids, positions, self, self._layer_done))

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Tensor:
        """As `ContextAttention` does for one."""
        result = self._side_by_side.attend(query, key, value, sm_scale)
        for each, rows in zip(self._slices, self.rows, strict=True):
            each.attention.write(layer, key[:, rows], value[:, rows])
            own = Partial(result.out[:, rows], result.lse[:, rows])
            each.attention.merge_visible_into(own, query[:, rows], layer, sm_scale)
        return result.out.to(query.dtype)

    def _layer_done(self, layer: int) -> None:
        for number, each in enumerate(self._slices):
            if each.on_layer is None or self.errors[number] is not None:
                continue
            try:
                each.on_layer(layer)
            except BaseException as error:  # its caller's alone
                self.errors[number] = error
