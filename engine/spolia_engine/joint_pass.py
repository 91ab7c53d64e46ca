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

A decode step may go along: it is a few rows more, whose pass alone would read the weights for them.

Of the seconds of a pass each slice has what reading its own context took, and of the rest what it has of the rows. By
rows alone 32 of them behind 4,096 tokens and 32 of a small document had 31 ms each (20 M parameters, one thread), where
they take 55 and 13 ms alone: who learns costs from shares would take long contexts for cheap.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

import torch
from torch import Tensor

from spolia_core.errors import InternalError
from spolia_engine.adapter import ModelAdapter
from spolia_engine.model_layers import LayerAttention
from spolia_engine.side_by_side import SideBySide
from spolia_engine.steps import Came, Ran, Slice, finish
from spolia_kernels import Partial

T = TypeVar("T")


def run_slices(adapter: ModelAdapter, slices: Sequence[Slice]) -> list[Came]:
    """Runs slices of different sequences, at least one, and says of each what came of it.

    A slice whose attention or `on_layer` raises goes no further for its caller, who gets what was raised; the others go
    on. What the model raises is everybody's: `InternalError` where there are others. Source: Orca (OSDI '22)
    §4, selective batching.
    """
    started = time.perf_counter()
    try:
        joined = _Joined(slices, adapter.device)
        hidden = joined.run(adapter)
    except BaseException as error:  # each caller's, whatever it is
        return failed(slices, error)
    return joined.found(hidden, time.perf_counter() - started - joined.own_attention_s)


def failed(slices: Sequence[Slice], error: BaseException) -> list[Came]:
    """What came of slices whose pass raised: an error for each, as whoever gets one may add to it."""
    return [error] if len(slices) == 1 else [_shared(error, len(slices)) for _ in slices]


def _shared(error: BaseException, num_slices: int) -> InternalError:
    told = InternalError(f"a pass of {num_slices} prompts failed: {error!r}")
    told.__cause__ = error
    return told


@dataclass(frozen=True, slots=True, eq=False)
class StepRows:
    """The rows of a decode step: one of each sequence, and what attends them."""

    token_ids: Sequence[int]
    positions: Sequence[int]
    attention: LayerAttention


@dataclass(frozen=True, eq=False)  # no slots: a generic class cannot have them before Python 3.12
class JointPass(Generic[T]):
    """What came of a pass that a decode step and slices of prompts shared."""

    step: T
    """Of the step: its hidden states, or what was made of them."""
    slices: list[Came]
    """Of each slice, in the order in which they were given."""


def run_beside(adapter: ModelAdapter, step: StepRows, slices: Sequence[Slice]) -> JointPass[Tensor]:
    """Runs a decode step and slices in one pass; `step` of the result is its hidden states.

    Raises what the model raises. The step's attention, which reads contexts of its own, is no slice's cost. Source:
    Sarathi-Serve (2403.02310) §4.1, piggybacking of decodes.
    """
    started = time.perf_counter()
    joined = _Joined(slices, adapter.device)
    both = _Beside(step.attention, len(step.token_ids), joined)
    token_ids, positions = [*step.token_ids, *joined.token_ids], [*step.positions, *joined.positions]
    hidden = finish(adapter.forward_steps(token_ids, positions, both, joined.layer_done))
    shared_s = time.perf_counter() - started - both.step_attention_s - joined.own_attention_s
    num_step_rows = len(step.token_ids)
    share_s = shared_s * joined.num_rows / len(hidden)
    return JointPass(hidden[:num_step_rows], joined.found(hidden[num_step_rows:], share_s))


class _Joined:
    """Rows of several slices, one slice after the other, the shortest first; and attention of a pass over them."""

    def __init__(self, slices: Sequence[Slice], device: torch.device) -> None:
        self._order = sorted(range(len(slices)), key=lambda i: slices[i].num_rows)
        self._slices = [slices[i] for i in self._order]
        lens = [each.num_rows for each in self._slices]
        self.num_rows = sum(lens)
        ends = torch.tensor(lens).cumsum(0).tolist()
        self._rows = [slice(end - length, end) for end, length in zip(ends, lens, strict=True)]
        self._errors: list[BaseException | None] = [None] * len(slices)
        self._own_attention_s = [0.0] * len(slices)
        self._side_by_side = SideBySide(lens, device)

    @property
    def token_ids(self) -> list[int]:
        """Of all rows."""
        return list(chain.from_iterable(each.token_ids for each in self._slices))

    @property
    def positions(self) -> list[int]:
        """Of all rows."""
        return list(chain.from_iterable(each.positions for each in self._slices))

    def run(self, adapter: ModelAdapter) -> Tensor:
        """Hidden states of all rows."""
        if len(self._slices) == 1:
            (one,) = self._slices
            return finish(adapter.forward_steps(one.token_ids, one.positions, one.attention, one.on_layer))
        return finish(adapter.forward_steps(self.token_ids, self.positions, self, self.layer_done))

    @property
    def own_attention_s(self) -> float:
        """Seconds that slices were at what they read alone."""
        return sum(self._own_attention_s)

    def found(self, hidden: Tensor, shared_s: float) -> list[Came]:
        """What came of each slice, in the order in which they were given; `shared_s`: seconds of all rows alike."""
        found: dict[int, Came] = {}
        for index, rows, own_s, error in zip(self._order, self._rows, self._own_attention_s, self._errors, strict=True):
            seconds = own_s + shared_s * (rows.stop - rows.start) / self.num_rows
            found[index] = Ran(hidden[rows], seconds) if error is None else error
        return [found[index] for index in range(len(self._order))]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Tensor:
        """As `ContextAttention` does for one."""
        result = self._side_by_side.attend(query, key, value, sm_scale)
        for number, (each, rows) in enumerate(zip(self._slices, self._rows, strict=True)):
            started = time.perf_counter()
            with self._telling(number):
                each.attention.write(layer, key[:, rows], value[:, rows])
                own = Partial(result.out[:, rows], result.lse[:, rows])
                each.attention.add_visible_to(own, query[:, rows], layer, sm_scale)
            self._own_attention_s[number] += time.perf_counter() - started
        return result.out.to(query.dtype)

    def layer_done(self, layer: int) -> None:
        """Tells each slice's listener, unless something went wrong with the slice."""
        for number, each in enumerate(self._slices):
            if each.on_layer is not None and self._errors[number] is None:
                with self._telling(number):
                    each.on_layer(layer)

    @contextmanager
    def _telling(self, number: int) -> Iterator[None]:
        """What is raised inside is that slice's caller's alone: the first of it."""
        try:
            yield
        except BaseException as error:  # whatever it is
            self._errors[number] = self._errors[number] or error


class _Beside:
    """A decode step's rows, then those of slices."""

    def __init__(self, step: LayerAttention, num_step_rows: int, joined: _Joined) -> None:
        self._step = step
        self._rows = slice(num_step_rows)
        self._rest = slice(num_step_rows, None)
        self._joined = joined
        self.step_attention_s = 0.0

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Tensor:
        """Attention of each kind over its own."""
        started = time.perf_counter()
        rows, rest = self._rows, self._rest
        step = self._step(layer, query[:, rows], key[:, rows], value[:, rows], sm_scale)
        self.step_attention_s += time.perf_counter() - started
        return torch.cat((step, self._joined(layer, query[:, rest], key[:, rest], value[:, rest], sm_scale)), 1)
