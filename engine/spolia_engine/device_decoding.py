"""Decoding on a device: a captured step for each number of rows, the batch loaded when it changes, one launch a step.

A batch runs in the smallest bucket that holds it. One that fits none, in rows or in what its rows read, runs by
operations in buffers of its own size, which is slower and is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spolia_core.errors import NotSupported
from spolia_core.sampling import SamplingParams
from spolia_engine.adapter import ModelAdapter
from spolia_engine.device_plan import DevicePlan, plan_device_step
from spolia_engine.device_step import DeviceStep, StepBatch, StepCapacity
from spolia_engine.device_work import WorkCutter
from spolia_engine.sequence import Sequence as DecodeSequence
from spolia_engine.sharing import Sharing
from spolia_engine.slot_memory import SlotMemory
from spolia_kernels.paged import Tails
from spolia_kernels.sample import Draws

HEAD_DIMS = (64, 128, 256)
"""What the device's kernels are made for."""


@dataclass(frozen=True, slots=True)
class DeviceSettings:
    """How much a captured step holds. The defaults serve some hundred short answers over a few documents each."""

    row_buckets: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """Rows of each captured step, ascending. More rows than the last run by operations."""
    parts_per_row: int = 32
    """Spans that a row reads, or pieces of them, each with a partial; on average over a full bucket."""
    min_parts: int = 1024
    """Of any bucket: few rows read their spans in many pieces, to keep a device busy."""

    def parts(self, rows: int) -> int:
        """Parts that a step of so many rows holds."""
        return max(self.min_parts, rows * self.parts_per_row)

    def buffer_bytes(self, *, num_q_heads: int, head_dim: int, vocab_size: int, itemsize: int) -> int:
        """What the buffers of all buckets take: their partials, and the logits that each leaves. All else is small."""
        partial = 4 * num_q_heads * (head_dim + 1)
        return sum(self.parts(rows) * partial + rows * vocab_size * itemsize for rows in self.row_buckets)

    def bucket_for(self, num_rows: int) -> int | None:
        """Rows of the smallest step that holds so many; None where none does."""
        return next((rows for rows in self.row_buckets if rows >= num_rows), None)


@dataclass(frozen=True, slots=True)
class DrawnRow:
    """What was drawn for a sequence: its next token. `logits` [vocab_size] are good until the next step."""

    token_id: int
    """Below 0 where the logits are NaN."""
    logprob: float
    """NaN on a CPU, unless the request asks for it and for no others."""
    logits: Tensor


class DeviceDecoding:
    """Steps of one model over one memory. One thread's, and one stream's."""

    def __init__(self, adapter: ModelAdapter, memory: SlotMemory, settings: DeviceSettings) -> None:
        """Raises `NotSupported` for a model whose heads or activation the device's kernels do not have."""
        _check(adapter)
        self._adapter = adapter
        self._memory = memory
        self._settings = settings
        self._angles = adapter.angles(adapter.max_context_tokens)
        num_kv_heads = adapter.kv_shape.num_kv_heads
        self._cutter = WorkCutter(num_kv_heads, adapter.num_q_heads // num_kv_heads, adapter.device)
        self._steps: dict[int, DeviceStep] = {}
        self._step: DeviceStep | None = None
        self._loaded: list[tuple[DecodeSequence, int]] = []
        self.num_steps = 0
        self.num_eager_steps = 0
        """Steps of batches that no bucket holds, of `num_steps`."""

    def prepare(self) -> None:
        """Takes the steps' buffers; on a CUDA device it captures every bucket, which takes seconds.

        Call it before the first step, which else does; nobody else may use the device meanwhile.
        """
        pool = None
        for rows in reversed(self._settings.row_buckets):  # the largest first: the others fit its memory
            step = self._steps[rows] = self._made(self._capacity(rows))
            if self._adapter.device.type == "cuda":
                pool = step.capture(pool)

    def step(self, sequences: Sequence[DecodeSequence], sharing: Sharing) -> list[DrawnRow]:
        """Runs each sequence's newest token, whose KV is written, and draws the next. The caller counts the tokens.

        At least one sequence, each with room for the token.
        """
        if not self._steps:
            self.prepare()
        now = [(sequence, sequence.tail.length) for sequence in sequences]
        if self._step is None or now != self._loaded or self._step.num_steps_left < 1:
            self._load(sequences, sharing)
        step = self._step
        assert step is not None
        num_rows = len(sequences)
        # Whoever drew on the host, under a constraint say, drew another token than the device did.
        step.token_ids[:num_rows].copy_(torch.tensor([sequence.next_token for sequence in sequences]))
        self._loaded = []  # a step that fails leaves it unknown how far the device came
        step.run()
        self._loaded = [(sequence, length + 1) for sequence, length in now]
        self.num_steps += 1
        self.num_eager_steps += step not in self._steps.values()
        token_ids, logprobs = step.drawn.token_ids[:num_rows].tolist(), step.drawn.logprobs[:num_rows].tolist()
        assert step.last_logits is not None
        return [DrawnRow(*row) for row in zip(token_ids, logprobs, step.last_logits, strict=False)]

    @property
    def loaded(self) -> DeviceStep | None:
        """What ran the last batch, which it holds. Who runs it but by `step` forgets the batch afterwards."""
        return self._step

    def forget(self) -> None:
        """Drops the batch, which names its sequences."""
        self._loaded = []
        if self._step is not None and self._step not in self._steps.values():
            self._step = None

    def _load(self, sequences: Sequence[DecodeSequence], sharing: Sharing) -> None:
        plan = plan_device_step(
            [sequence.ranges for sequence in sequences],
            [sequence.tail for sequence in sequences],
            sharing,
            self._memory.page_size,
        )
        rows = self._settings.bucket_for(len(sequences))
        batch = self._batch(sequences, plan, self._cutter.tile(rows or len(sequences)))
        if rows is not None and batch.fits(self._steps[rows].capacity):
            step = self._steps[rows]
        else:
            step = self._made(_capacity_of(batch))
        step.load(batch)
        self._step = step

    def _batch(self, sequences: Sequence[DecodeSequence], plan: DevicePlan, tile: int) -> StepBatch:
        device = self._adapter.device
        most = max(len(pages) for pages in plan.pages)
        pages = torch.zeros(len(plan.pages), most, dtype=torch.int32)
        for row, of_row in enumerate(plan.pages):
            pages[row, : len(of_row)] = torch.tensor(of_row, dtype=torch.int32)
        positions = [sequence.position for sequence in sequences]
        starts = [
            sequence.num_context_tokens - before for sequence, before in zip(sequences, plan.num_before, strict=True)
        ]
        num_steps = min(
            len(of_row) * self._memory.page_size - (position - start)
            for of_row, position, start in zip(plan.pages, positions, starts, strict=True)
        )

        def ints(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        token_ids = torch.tensor([sequence.next_token for sequence in sequences], device=device)
        work = self._cutter.cut(plan.spans, len(sequences), tile)
        tails = Tails(pages.to(device), ints(starts), ints(positions))
        return StepBatch(work, tails, token_ids, _draws(sequences, device), num_steps)

    def _capacity(self, rows: int) -> StepCapacity:
        parts, heads = self._settings.parts(rows), self._adapter.kv_shape.num_kv_heads
        return StepCapacity(
            rows=rows,
            items=heads * parts,  # no item has less than one reading
            readings=parts,  # each has a part at least
            parts=parts,
            # A row has no more of its own than a context; its list of pages may begin inside one.
            tail_pages=-(-self._adapter.max_context_tokens // self._memory.page_size) + 1,
            tile=self._cutter.tile(rows),
        )

    def _made(self, capacity: StepCapacity) -> DeviceStep:
        return DeviceStep(self._adapter.decoder, self._memory.layers, self._angles, capacity)


def _capacity_of(batch: StepBatch) -> StepCapacity:
    work = batch.work
    return StepCapacity(
        rows=batch.token_ids.shape[0],
        items=work.items.shape[0],
        readings=work.rows.shape[0],
        parts=work.parts.shape[0],
        tail_pages=batch.tails.pages.shape[1],
        tile=work.tile,
    )


def draws_of(params: Sequence[tuple[SamplingParams, int, int]], device: torch.device | str) -> Draws:
    """How rows draw: (parameters, sample index, token index) each."""

    def held(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    each = [p for p, _, _ in params]
    most = 2**31 - 1  # no vocabulary is larger: it keeps all
    return Draws(
        temperature=held([p.temperature for p in each], torch.float64),
        top_p=held([p.top_p for p in each], torch.float64),
        top_k=held([min(p.top_k, most) for p in each], torch.int32),
        seed=held([p.seed - 2**64 if p.seed >= 2**63 else p.seed for p in each], torch.int64),
        sample_index=held([sample for _, sample, _ in params], torch.int64),
        token_index=held([token for _, _, token in params], torch.int64),
    )


def _draws(sequences: Sequence[DecodeSequence], device: torch.device) -> Draws:
    generations = [sequence.generation for sequence in sequences]
    return draws_of([(g.params, g.sample_index, len(g.token_ids)) for g in generations], device)


def _check(adapter: ModelAdapter) -> None:
    head_dim = adapter.kv_shape.head_dim
    if adapter.device.type == "cuda" and head_dim not in HEAD_DIMS:
        raise NotSupported(
            f"every layer: heads have {head_dim} numbers; on a GPU they have one of {HEAD_DIMS}",
            field="head_dim",
            limit=str(HEAD_DIMS),
            actual=str(head_dim),
        )
    if adapter.rotary.rotary_dim != head_dim:
        raise NotSupported(
            f"every layer: {adapter.rotary.rotary_dim} of a head's {head_dim} numbers rotate; on a GPU all do",
            field="rotary_dim",
        )
    if adapter.hidden_act != "silu":
        raise NotSupported(
            f"every layer: hidden_act is {adapter.hidden_act!r}; on a GPU it is 'silu'", field="hidden_act"
        )
