"""Sequences to decode, over KV of random numbers: a step takes as long whatever the numbers are.

So no prompt is computed, and 16 thousand tokens of prefix cost their memory and nothing else. That what is computed
over them is right is for the tests to show.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

import torch

from spolia_bench.shared.pairs import Step
from spolia_core.prompt import Part, Prompt
from spolia_core.reuse import ChunkKind
from spolia_core.sampling import SamplingParams
from spolia_engine.context import Context
from spolia_engine.core import EngineCore
from spolia_engine.decode_steps import PlannedBatch
from spolia_engine.link_plan import LinkPlan, plan_link
from spolia_engine.run import Run
from spolia_engine.sequence import Sequence as DecodeSequence
from spolia_engine.sequence_starts import start_sequence
from spolia_engine.sharing import Sharing, never_shared

QUESTION_TOKENS = 16
MAX_STEPS = 400


def random_run(core: EngineCore, num_tokens: int, rope_base: int = 0) -> Run:
    """KV of random numbers, with one reference."""
    extent = core.pool.allocate(num_tokens)
    for memory in (extent.key, extent.value):
        for layer in memory:
            layer.normal_()
    return Run(extent, 0, num_tokens, rope_base)


class Batch:
    """Sequences that decode together, each with a token to run."""

    def __init__(self, core: EngineCore, contexts: Sequence[Context]) -> None:
        """Takes the contexts."""
        self.core = core
        self.sequences = [_decoding(core, context) for context in contexts]

    def step(self, sharing: Sharing) -> Step:
        """Runs one step under a switch, each time it is called. The plan is made here, once."""
        return partial(self._run, self.core.decoding.plan_batch(self.sequences, sharing))

    def step_alone(self) -> Step:
        """Runs one step of each sequence by itself: `Decoding.deterministic`."""
        planned = [self.core.decoding.plan_batch([sequence], never_shared) for sequence in self.sequences]

        def run() -> torch.Tensor:
            logits = torch.cat([self.core.decoding.run_step(each) for each in planned])
            for sequence in self.sequences:
                sequence.generation.token_ids.append(1)
            return logits

        return run

    def _run(self, planned: PlannedBatch) -> torch.Tensor:
        logits = self.core.decoding.run_step(planned)
        for sequence in self.sequences:
            sequence.generation.token_ids.append(1)
        return logits

    @property
    def num_tail_tokens(self) -> int:
        """Tokens that each sequence has decoded."""
        return self.sequences[0].tail.length

    def close(self) -> None:
        """Gives everything back."""
        for sequence in self.sequences:
            sequence.close()


def prefix_batch(core: EngineCore, num_rows: int, prefix_tokens: int) -> Batch:
    """Rows that share one prefix, none where it has no tokens, each with a question of its own."""
    prefix = [random_run(core, prefix_tokens)] if prefix_tokens else []
    contexts = []
    for row in range(num_rows):
        if row:
            for run in prefix:
                core.pool.retain(run.extent)
        contexts.append(core.arrived_context(prefix, random_run(core, QUESTION_TOKENS, prefix_tokens)))
    return Batch(core, contexts)


def permuted_batch(core: EngineCore, num_rows: int, num_documents: int, document_tokens: int, k: int) -> Batch:
    """Rows that read the same documents, each in an order of its own, `k` link tokens in each."""
    order = random.Random(0)
    ids = [core.id_space(bytes(32)).local([d] * document_tokens) for d in range(num_documents)]
    runs = {}
    for chunk_id in ids:
        runs[chunk_id] = random_run(core, document_tokens)
        core.resident.register(chunk_id, ChunkKind.LOCAL, runs[chunk_id])
    orders = [order.sample(range(num_documents), num_documents) for _ in range(num_rows)]
    contexts = [_linked(core, each, ids, document_tokens, k) for each in orders]
    for run in runs.values():
        core.pool.release(run.extent)
    return Batch(core, contexts)


def _linked(core: EngineCore, order: Sequence[int], ids: Sequence[bytes], document_tokens: int, k: int) -> Context:
    documents = [Part((d,) * document_tokens, ids[d]) for d in order]
    prompt = Prompt((Part((1,)), *documents, Part((1,) * QUESTION_TOKENS)))
    plan: LinkPlan = plan_link(prompt, k)
    runs: dict[int, Run] = {}
    for fragment in plan.fragments:
        chunk_id = prompt.parts[fragment.part_index].chunk_id
        assert chunk_id is not None
        if fragment.part_index not in runs:
            run = core.resident.acquire(chunk_id)
            assert run is not None
            runs[fragment.part_index] = run
    return core.arrived_linked_context(plan, runs, [], random_run(core, len(plan.positions)))


def _decoding(core: EngineCore, context: Context) -> DecodeSequence:
    sequence = start_sequence(context, core.generation(SamplingParams(max_tokens=MAX_STEPS, ignore_eos=True)))
    sequence.generation.token_ids.append(1)
    return sequence
