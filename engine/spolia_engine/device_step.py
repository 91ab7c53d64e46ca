"""A decode step that a CUDA graph can hold: fixed buffers, nothing allocated, nothing read back.

What changes when the batch changes (who reads what, how each row draws) is copied into the buffers; what changes every
step (positions, tokens) is advanced on the device. So a step is one graph launch, and the host may plan the next batch
meanwhile. Without a device the same step runs operation by operation, by the kernels' references.
Source: Hydragen (2402.05099) §3 for the decomposition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from spolia_engine.cuda_graph import captured
from spolia_engine.model_layers import Decoder, DecoderLayer
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
from spolia_kernels.sample import Drawn, Draws, sample_rows


@dataclass(frozen=True, slots=True)
class StepCapacity:
    """What a step's buffers hold. A batch that needs more runs in a larger step, or none."""

    rows: int
    items: int
    readings: int
    parts: int
    tail_pages: int
    tile: int


@dataclass(frozen=True, slots=True, eq=False)
class StepBatch:
    """A batch as a step's buffers take it."""

    work: PagedWork
    tails: Tails
    token_ids: Tensor
    """int64 [num_rows]: the rows' newest tokens, whose KV is written next."""
    draws: Draws
    num_steps: int
    """Steps that every row has pages of its own for. Behind them, lists of pages name pages of others."""

    def fits(self, capacity: StepCapacity) -> bool:
        """Whether a step of this capacity can run it."""
        work = self.work
        found = (self.token_ids.shape[0], work.items.shape[0], work.rows.shape[0], work.parts.shape[0])
        most = (capacity.rows, capacity.items, capacity.readings, capacity.parts)
        fits = all(size <= room for size, room in zip(found, most, strict=True))
        return fits and self.tails.pages.shape[1] <= capacity.tail_pages and work.tile == capacity.tile


class DeviceStep:
    """One decode step of up to `capacity.rows` sequences. Not thread-safe; one stream."""

    def __init__(self, model: Decoder, layers_kv: tuple[PagedKv, ...], angles: Angles, capacity: StepCapacity):
        assert len(layers_kv) == len(model.layers)
        self._model = model
        self._kv = layers_kv
        self._angles = angles
        self.capacity = capacity
        device = model.embedding.device
        first = model.layers[0]

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
            torch.zeros(max(1, capacity.parts), first.num_q_heads, first.head_dim, device=device),
            torch.zeros(max(1, capacity.parts), first.num_q_heads, device=device),
        )
        self._seen = torch.zeros(
            capacity.rows, first.num_q_heads, first.head_dim, dtype=model.embedding.dtype, device=device
        )
        self.token_ids = torch.zeros(capacity.rows, dtype=torch.int64, device=device)
        """The rows' newest tokens: what the next step runs. Whoever drew others writes them here."""
        self._draws = Draws.greedy(capacity.rows, device)
        self.drawn = Drawn.zeros(capacity.rows, device)
        """What the last step drew."""
        self.last_logits: Tensor | None = None
        """[rows, vocab_size] of the last step, the model's dtype; overwritten by the next."""
        self.num_steps_left = 0
        """Steps that the loaded batch has pages and angles for."""
        self._graph: torch.cuda.CUDAGraph | None = None

    def load(self, batch: StepBatch) -> None:
        """Makes a batch the one that steps run. Raises ValueError where it does not fit the buffers.

        What buffers hold behind the batch stays from others: a step reads rows, items and pages as far as the batch
        counts them. Rows behind it compute what nobody reads, in lists that name no tails, and write no KV.
        """
        work, tails, num_rows = batch.work, batch.tails, batch.token_ids.shape[0]
        if not batch.fits(self.capacity):
            raise ValueError("the batch does not fit the step's buffers")
        rows = {tails.pages.shape[0], tails.starts.shape[0], tails.positions.shape[0], work.part_starts.shape[0] - 1}
        if rows != {num_rows} or not num_rows:
            raise ValueError(f"{num_rows} tokens, tails and parts of {sorted(rows)} rows")
        self.num_steps_left = min(batch.num_steps, self._angles.cos.shape[0] - int(tails.positions.max()))
        pairs = [
            (self._work.items, work.items),
            (self._work.rows, work.rows),
            (self._work.offsets, work.offsets),
            (self._work.part_starts, work.part_starts),
            (self._work.parts, work.parts),
            (self._tails.pages, tails.pages),
            (self._tails.starts, tails.starts),
            (self._tails.positions, tails.positions),
            (self.token_ids, batch.token_ids),
            *((getattr(self._draws, f.name), getattr(batch.draws, f.name)) for f in fields(Draws)),
        ]
        for held, new in pairs:
            held[tuple(slice(size) for size in new.shape)].copy_(new)
        self._work.num_items.copy_(work.num_items)
        self._num_rows.fill_(num_rows)

    def run(self) -> None:
        """One step: a graph launch once captured, operation by operation before.

        Raises ValueError where a row's pages are full, or positions go past the angles: load the batch with more.
        """
        if self.num_steps_left < 1:
            raise ValueError("no room for another token of some row")
        self.num_steps_left -= 1
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step()

    def capture(self, pool: Any = None) -> Any:
        """Makes `run` a graph launch. Runs the step meanwhile, whatever is loaded: load the batch afterwards.

        `pool` is the memory of other graphs (torch's handle), none of which runs at the same time; returns this one's.
        """
        self._graph = captured(self._step, pool)
        return self._graph.pool()

    @torch.inference_mode()
    def _step(self) -> None:
        self.last_logits = self.logits()
        sample_rows(self.last_logits, self._draws, into=self.drawn, num_rows=self._num_rows)
        self.token_ids.copy_(self.drawn.token_ids)
        self._draws.token_index.add_(1)
        self._tails.positions.add_(1)

    def logits(self, attention: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
        """Logits [rows, vocab] of the newest tokens, whose KV is written. Timings put another for `attention`."""
        model, rows = self._model, self.capacity.rows
        attend = attention or self._attend
        # A row that drew nothing has token -1; whoever reads what was drawn ends it.
        hidden = model.embedding[self.token_ids.clamp_min(0)]
        delta: Tensor | None = None
        for layer in model.layers:
            norm = layer.input_norm
            normed = add_rms_norm(hidden, delta, norm.weight, norm.eps)
            delta = layer.out(attend(layer.index, _heads_of(layer, normed)).view(rows, -1))
            norm = layer.mlp_norm
            normed = add_rms_norm(hidden, delta, norm.weight, norm.eps)
            delta = layer.down(silu_mul(layer.gate_up(normed).contiguous()))
        return model.head(add_rms_norm(hidden, delta, model.norm.weight, model.norm.eps))

    def _attend(self, index: int, qkv: Tensor) -> Tensor:
        layer, kv = self._model.layers[index], self._kv[index]
        rows = Rows.of(qkv, layer.num_q_heads)
        partials = attend_spans(
            rows.query,
            kv,
            self._work,
            self._tails.positions,
            self._angles,
            sm_scale=layer.sm_scale,
            into=self._partials,
        )
        return attend_tails(
            rows,
            kv,
            self._tails,
            partials,
            self._work,
            self._angles,
            sm_scale=layer.sm_scale,
            into=self._seen,
            num_rows=self._num_rows,
        )


def _heads_of(layer: DecoderLayer, normed: Tensor) -> Tensor:
    """Queries, keys and values of rows side by side, unrotated: [rows, heads, head_dim]."""
    heads = layer.qkv(normed).view(normed.shape[0], -1, layer.head_dim)
    if layer.query_norm is None or layer.key_norm is None:
        return heads
    num_q, num_kv = layer.num_q_heads, layer.num_kv_heads
    query, key, value = heads.split((num_q, num_kv, num_kv), 1)
    return torch.cat((layer.query_norm(query), layer.key_norm(key), value), 1)
