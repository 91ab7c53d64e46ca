"""Decode steps: sequences planned as a batch, and run together or each alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spolia_engine.adapter import ModelAdapter
from spolia_engine.decode_attention import DecodeAttention
from spolia_engine.joint_pass import JointPass, StepRows, run_beside
from spolia_engine.sequence import Sequence as DecodeSequence
from spolia_engine.sharing import Sharing, never_shared
from spolia_engine.step_plan import StepPlan, plan_step
from spolia_engine.steps import Slice


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
        """See `Decoding.step_logits`."""
        return self.run(self._planned(sequences, sharing))

    def beside(
        self, sequences: Sequence[DecodeSequence], sharing: Sharing, slices: Sequence[Slice]
    ) -> JointPass[Tensor]:
        """`together`, in one pass with slices of prompts; `step` of the result is its logits."""
        planned = self._planned(sequences, sharing)
        found = run_beside(self._adapter, self._rows(planned), slices)
        return JointPass(self._logits(planned, found.step), found.slices)

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
        return PlannedBatch(batch, plan, DecodeAttention(plan, tails, self._adapter.rotary, self._adapter.num_q_heads))

    def run(self, planned: PlannedBatch) -> Tensor:
        """`together` of a planned batch."""
        rows = self._rows(planned)
        return self._logits(planned, self._adapter.forward(rows.token_ids, rows.positions, rows.attention))

    def _planned(self, sequences: Sequence[DecodeSequence], sharing: Sharing) -> PlannedBatch:
        batch = tuple(sequences)
        if self._plan is None or self._plan.sequences != batch:
            self._plan = self.plan(batch, sharing)
        return self._plan

    def _rows(self, planned: PlannedBatch) -> StepRows:
        """The step's rows in the plan's order, with room for their KV."""
        for sequence in planned.sequences:
            sequence.make_room()
        planned.attention.begin()
        rows = [planned.sequences[number] for number in planned.plan.order]
        return StepRows([s.next_token for s in rows], [s.position for s in rows], planned.attention)

    def _logits(self, planned: PlannedBatch, hidden: Tensor) -> Tensor:
        """The sequences' logits, in their own order; they have made their step."""
        logits = self._adapter.logits(hidden)
        for sequence in planned.sequences:
            sequence.tail.length += 1
        if planned.plan.order == tuple(range(len(planned.sequences))):
            return logits
        return logits[torch.tensor(planned.plan.order, device=logits.device).argsort()]

    def forget(self) -> None:
        """Drops the plan of the last batch, which names its extents. Call it when a sequence of it is closed."""
        self._plan = None
        self._plans_alone.clear()
