"""A decode step that a CUDA graph can hold: fixed buffers, nothing allocated, nothing read back.

What changes when the batch changes (who reads what) is copied into the buffers; what changes every step (positions,
tokens) is advanced on the device. So a step is one graph launch, and the host may plan the next batch meanwhile.
Source: Hydragen (2402.05099) §3 for the decomposition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from spolia_kernels import Partial
from spolia_kernels.fused import add_rms_norm, silu_mul
from spolia_kernels.paged import (
    Angles,
    PagedKv,
    PagedWork,
    Rows,
    Tails,
    attend_spans,
    attend_tails,
)
from spolia_kernels.paged.work import ITEM_FIELDS


@dataclass(frozen=True, slots=True, eq=False)
class DeviceLayer:
    """Weights of one layer, [out, in] each: queries, keys and values as one product, gate and up as one."""

    input_norm: Tensor
    qkv: Tensor
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DeviceModel:
    """A Llama's weights on a device. `head` and `embedding` [vocab, width]."""

    layers: tuple[DeviceLayer, ...]
    embedding: Tensor
    norm: Tensor
    head: Tensor
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float


@dataclass(frozen=True, slots=True)
class StepCapacity:
    """What a step's buffers hold. A batch that needs more runs in a larger step, or none."""

    rows: int
    items: int
    readings: int
    parts: int
    tail_pages: int
    tile: int


class DeviceStep:
    """One decode step of up to `capacity.rows` sequences, greedy. Not thread-safe; one stream."""

    def __init__(self, model: DeviceModel, layers_kv: tuple[PagedKv, ...], angles: Angles, capacity: StepCapacity):
        assert len(layers_kv) == len(model.layers)
        self._model = model
        self._kv = layers_kv
        self._angles = angles
        self.capacity = capacity
        device = model.embedding.device

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._work = PagedWork(
            items=ints(capacity.items, ITEM_FIELDS),
            num_items=ints(1),
            rows=ints(capacity.readings),
            offsets=ints(capacity.readings),
            part_starts=ints(capacity.rows + 1),
            parts=ints(capacity.parts),
            num_parts=capacity.parts,
            tile=capacity.tile,
        )
        self._tails = Tails(ints(capacity.rows, capacity.tail_pages), ints(capacity.rows), ints(capacity.rows))
        self._num_rows = ints(1)
        self._partials = Partial(
            torch.zeros(max(1, capacity.parts), model.num_q_heads, model.head_dim, device=device),
            torch.zeros(max(1, capacity.parts), model.num_q_heads, device=device),
        )
        self._seen = torch.zeros(
            capacity.rows, model.num_q_heads, model.head_dim, dtype=model.embedding.dtype, device=device
        )
        self.token_ids = torch.zeros(capacity.rows, dtype=torch.int64, device=device)
        """The rows' newest tokens: what the next step runs."""
        self.num_steps_left = 0
        """Steps that the loaded batch has pages and angles for."""
        self._graph: torch.cuda.CUDAGraph | None = None

    def load(self, work: PagedWork, tails: Tails, token_ids: Tensor) -> None:
        """Makes a batch the one that steps run. Raises ValueError where it does not fit the buffers."""
        num_rows = token_ids.shape[0]
        pairs = [
            (self._work.items, work.items),
            (self._work.rows, work.rows),
            (self._work.offsets, work.offsets),
            (self._work.part_starts, work.part_starts),
            (self._work.parts, work.parts),
            (self._tails.pages, tails.pages),
            (self._tails.starts, tails.starts),
            (self._tails.positions, tails.positions),
            (self.token_ids, token_ids),
        ]
        if work.tile != self.capacity.tile or any(_exceeds(new, held) for held, new in pairs):
            raise ValueError("the batch does not fit the step's buffers")
        rows = {tails.pages.shape[0], tails.starts.shape[0], tails.positions.shape[0], work.part_starts.shape[0] - 1}
        if rows != {num_rows} or not num_rows:
            raise ValueError(f"{num_rows} tokens, tails and parts of {sorted(rows)} rows")
        room = tails.pages.shape[1] * self._kv[0].page_size - int((tails.positions - tails.starts).max())
        self.num_steps_left = min(room, self._angles.cos.shape[0] - int(tails.positions.max()))
        for held, new in pairs:
            held[tuple(slice(size) for size in new.shape)].copy_(new)
        self._work.num_items.copy_(work.num_items)
        self._num_rows.fill_(num_rows)

    def run(self) -> None:
        """One step: a graph launch once captured, kernel by kernel before.

        Raises ValueError where a row's pages are full, or positions go past the angles: load the batch with more.
        """
        if self.num_steps_left < 1:
            raise ValueError("no room for another token of some row")
        self.num_steps_left -= 1
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step()

    def capture(self) -> None:
        """Makes `run` a graph launch. Runs the step meanwhile: load the batch afterwards."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels compile, libraries take their workspaces
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._graph = graph

    def _step(self) -> None:
        token_ids = self.logits().argmax(-1)
        self.token_ids.copy_(token_ids)
        self._tails.positions.add_(1)

    def logits(self, attention: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
        """Logits [rows, vocab] of the newest tokens, whose KV is written. Timings put another for `attention`."""
        model, rows = self._model, self.capacity.rows
        attend = attention or self._attend
        hidden = model.embedding[self.token_ids]
        delta: Tensor | None = None
        for index, layer in enumerate(model.layers):
            normed = add_rms_norm(hidden, delta, layer.input_norm, model.eps)
            qkv = linear(normed, layer.qkv).view(rows, -1, model.head_dim)
            delta = linear(attend(index, qkv).view(rows, -1), layer.out)
            normed = add_rms_norm(hidden, delta, layer.mlp_norm, model.eps)
            delta = linear(silu_mul(linear(normed, layer.gate_up)), layer.down)
        return linear(add_rms_norm(hidden, delta, model.norm, model.eps), model.head)

    def _attend(self, layer: int, qkv: Tensor) -> Tensor:
        model, kv = self._model, self._kv[layer]
        rows = Rows.of(qkv, model.num_q_heads)
        sm_scale = model.head_dim**-0.5
        partials = attend_spans(
            rows.query, kv, self._work, self._tails.positions, self._angles, sm_scale=sm_scale, into=self._partials
        )
        return attend_tails(
            rows,
            kv,
            self._tails,
            partials,
            self._work,
            self._angles,
            sm_scale=sm_scale,
            into=self._seen,
            num_rows=self._num_rows,
        )


def _exceeds(new: Tensor, held: Tensor) -> bool:
    return any(size > most for size, most in zip(new.shape, held.shape, strict=True))
