"""From contexts to answers: the first tokens, the steps that follow, and how they run.

A CPU plans a batch and runs it (`decode_steps.py`); a GPU launches a captured step (`device_decoding.py`). Who decodes
sees rows either way: what comes next of each sequence, which `accept_row` adds to its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from spolia_core.sampling import SamplingParams
from spolia_engine.adapter import ModelAdapter
from spolia_engine.context import Context
from spolia_engine.decode_steps import DecodeSteps, PlannedBatch
from spolia_engine.device_decoding import DeviceDecoding, DrawnRow
from spolia_engine.joint_pass import JointPass
from spolia_engine.next_tokens import drawn_rows
from spolia_engine.sampler import sample
from spolia_engine.sequence import Sequence as DecodeSequence
from spolia_engine.sharing import Sharing, always_shared, never_shared
from spolia_engine.steps import Slice


class Decoding:
    """Steps of one model's sequences. One thread's."""

    def __init__(self, adapter: ModelAdapter, device: DeviceDecoding | None) -> None:
        self._adapter = adapter
        self._steps = DecodeSteps(adapter)
        self.device = device
        """What decodes on a GPU; None on a CPU, where `plan_batch` and `run_step` do."""
        self.sharing: Sharing = always_shared
        self.deterministic = False
        """Each sequence takes its steps alone: what it says then does not depend on who decodes beside it, to the bit.

        Costs the batch: the weights are read once a sequence, and nothing is attended together.
        """

    def logits_after(self, contexts: Sequence[Context]) -> torch.Tensor:
        """Logits [num_contexts, vocab_size] of the token after each context, computed here or handed over."""
        hidden = [context.last_hidden for context in contexts if context.last_hidden is not None]
        assert len(hidden) == len(contexts), "nobody computed the last token of one"
        if self.deterministic:
            return torch.cat([self._adapter.logits(each[None]) for each in hidden])
        return self._adapter.logits(torch.stack(hidden))

    def first_token(self, context: Context, params: SamplingParams, token_index: int = 0, sample_index: int = 0) -> int:
        """Draws the token after a context, for who wants no more than that."""
        return sample(self.logits_after([context])[0], params, token_index, sample_index)

    def first_rows(self, sequences: Sequence[DecodeSequence]) -> Sequence[torch.Tensor | DrawnRow]:
        """A row for `accept_row` of each sequence that has no token yet: what comes after its context."""
        logits = self.logits_after([each.context for each in sequences])
        return drawn_rows([each.generation for each in sequences], logits) if self.device is None else list(logits)

    def step_rows(self, sequences: Sequence[DecodeSequence]) -> Sequence[torch.Tensor | DrawnRow]:
        """Runs each sequence's newest token; a row each for `accept_row`. Otherwise as `step_logits`."""
        if self.device is None:
            return drawn_rows([each.generation for each in sequences], self.step_logits(sequences))
        for sequence in sequences:
            sequence.make_room()
        rows: list[DrawnRow] = []
        for batch in [[each] for each in sequences] if self.deterministic else [list(sequences)]:
            found = self.device.step(batch, never_shared if self.deterministic else self.sharing)
            if self.deterministic:  # the next one's step overwrites them
                found = [replace(row, logits=row.logits.clone()) for row in found]
            rows += found
        for sequence in sequences:
            sequence.tail.length += 1
        return rows

    def step_logits(self, sequences: Sequence[DecodeSequence]) -> torch.Tensor:
        """Runs each sequence's newest token and returns the logits of the next, [num_sequences, vocab_size].

        At least one sequence. When it raises, every sequence stands where it stood before; `Busy` where the pool has no
        room for the KV of this step.
        """
        if self.device is not None:
            rows = self.step_rows(sequences)
            return torch.stack([row.logits if isinstance(row, DrawnRow) else row for row in rows]).float()
        return self._steps.alone(sequences) if self.deterministic else self._steps.together(sequences, self.sharing)

    @property
    def steps_beside_slices(self) -> bool:
        """Whether `step_beside` is for this engine: not where steps are graphs of a device, or each alone."""
        return self.device is None and not self.deterministic

    def step_beside(
        self, sequences: Sequence[DecodeSequence], slices: Sequence[Slice]
    ) -> JointPass[Sequence[torch.Tensor | DrawnRow]]:
        """`step_rows` in one pass with slices of prompts, at least one of each; `step` of the result is the rows."""
        found = self._steps.beside(sequences, self.sharing, slices)
        return JointPass(drawn_rows([each.generation for each in sequences], found.step), found.slices)

    def plan_batch(self, sequences: Sequence[DecodeSequence], sharing: Sharing) -> PlannedBatch:
        """What steps of these sequences do, good while all of them are open."""
        return self._steps.plan(sequences, sharing)

    def run_step(self, planned: PlannedBatch) -> torch.Tensor:
        """`step_logits` of a planned batch."""
        return self._steps.run(planned)

    def forget_plan(self) -> None:
        """Drops the plan of the last batch, which names its extents. Call it when a sequence of it is closed."""
        self._steps.forget()
        if self.device is not None:
            self.device.forget()
