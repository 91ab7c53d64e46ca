"""Decode steps: sequences planned as a batch, and run together or each alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spolia_engine.adapter import ModelAdapter
from spolia_engine.decode_attention import DecodeAttention
from spolia_engine.sequence import Sequence as DecodeSequence
from spolia_engine.sharing import Sharing, never_shared
from spolia_engine.step_plan import StepPlan, plan_step


@dataclass(frozen=True, slots=True, eq=False)
class PlannedBatch:
    """Sequences that decode together, and their step as data and as what runs it."""

    sequences: tuple[DecodeSequence, ...]
    plan: StepPlan
    attention: DecodeAttention


class DecodeSteps:
    """Plans batches and runs their steps. Keeps the plan of the last batch: it holds until the batch changes."""

    def __init__(self, adapter: ModelAdapter) -> None:
        self._adapter = adapter
        self._plan: PlannedBatch | None = None
        self._plans_alone: dict[DecodeSequence, PlannedBatch] = {}

    def together(self, sequences: Sequence[DecodeSequence], sharing: Sharing) -> Tensor:
        """See `EngineCore.step_logits`."""
        batch = tuple(sequences)
        if self._plan is None or self._plan.sequences != batch:
            self._plan = self.plan(batch, sharing)
        return self.run(self._plan)

    def alone(self, sequences: Sequence[DecodeSequence]) -> Tensor:
        """`together`, one sequence after the other: what it says does not depend on who else is there."""
        for sequence in sequences:
            sequence.make_room()
        logits: list[Tensor] = []
        try:
            for sequence in sequences:
                if sequence not in self._plans_alone:
                    self._plans_alone[sequence] = self.plan((sequence,), never_shared)
                logits.append(self.run(self._plans_alone[sequence]))
        except BaseException:
            for sequence in sequences[: len(logits)]:
                sequence.tail.length -= 1
            raise
        return torch.cat(logits)

    def plan(self, sequences: Sequence[DecodeSequence], sharing: Sharing) -> PlannedBatch:
        """What steps of these sequences do, good while all of them are open."""
        batch = tuple(sequences)
        tails = [sequence.tail for sequence in batch]
        plan = plan_step([sequence.ranges for sequence in batch], tails, sharing)
        return PlannedBatch(batch, plan, DecodeAttention(plan, tails, self._adapter.rotary))

    def run(self, planned: PlannedBatch) -> Tensor:
        """`together` of a planned batch."""
        batch, plan, attention = planned.sequences, planned.plan, planned.attention
        for sequence in batch:
            sequence.make_room()
        attention.begin()
        rows = [batch[number] for number in plan.order]
        hidden = self._adapter.forward([s.next_token for s in rows], [s.position for s in rows], attention)
        logits = self._adapter.logits(hidden)
        for sequence in batch:
            sequence.tail.length += 1
        if plan.order == tuple(range(len(batch))):
            return logits
        return logits[torch.tensor(plan.order, device=logits.device).argsort()]

    def forget(self) -> None:
        """Drops the plan of the last batch, which names its extents. Call it when a sequence of it is closed."""
        self._plan = None
        self._plans_alone.clear()
