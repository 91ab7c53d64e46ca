"""Runs every policy on the same token ids and scores it against full recompute.

For each case: chunks are compiled once per recipe and held, every policy opens its context once, and all questions are
forked from it in one pass. Kept of a pass are the final hidden states of the scored positions; distributions over the
vocabulary are made from them in slices, the reference's once for all policies, so memory does not grow with vocabulary
× positions.

Exact match of a question that is `exact` is "every answer token is the model's first choice under teacher forcing".
That equals greedy decoding giving exactly that answer: by induction, greedy decoding has the same prefix at each token.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from spolia_core.errors import InvalidRequest, NotSupported
from spolia_engine.adapter import ModelAdapter
from spolia_engine.context import release_runs
from spolia_engine.core import EngineCore
from spolia_engine.deviation import DEVIATION_LAYER
from spolia_engine.text import Decode
from spolia_fidelity.case import Case, Question, check_cases
from spolia_fidelity.generation import Generated, GenerationGate, answer_questions
from spolia_fidelity.measures import Distributions, Outcome, score
from spolia_fidelity.policy import CacheBlend, Full, Policy, chunk_runs, prompt_of

REFERENCE = "full"
MAX_SLICE_LOGITS = 1 << 22
"""Logits held at once per policy, rows × vocabulary: 32 MiB in float64."""
BLOCK_SIZE = 16

OnCase = Callable[[int, int], None]
"""Called when a case is done: how many are, of how many."""


@dataclass(slots=True)
class PolicyRun:
    """What one policy did, over all cases."""

    outcomes: list[Outcome] = field(default_factory=list)
    recomputed_tokens: int = 0
    reused_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Pass:
    """One policy on one case: hidden states [num_answer_tokens, hidden] per question, and texts it generated."""

    hidden: list[Tensor]
    generated: dict[int, Generated]


class Runner:
    """A model, its engines (one per recipe), and the policies to compare. Full recompute is always among them.

    Raises `InvalidRequest` for two policies of one name, `NotSupported` for one that needs more layers than there are.
    Deterministic for cases, policies, the number of torch threads and the machine's kind. Not thread-safe.
    """

    def __init__(self, adapter: ModelAdapter, decode: Decode, policies: Sequence[Policy]) -> None:
        self.adapter = adapter
        self.engines: dict[int, EngineCore] = {}
        """Of the last run, by the recipe's dummy sinks. Between runs nothing is held in them."""
        self._decode = decode
        named = {policy.name: policy for policy in policies}
        self.policies: tuple[Policy, ...] = tuple(policies) if REFERENCE in named else (Full(), *policies)
        if len(named) != len(policies):
            raise InvalidRequest("two policies have one name", field="policies", actual=", ".join(named))
        for policy in policies:
            if isinstance(policy, CacheBlend) and adapter.num_layers <= DEVIATION_LAYER:
                raise NotSupported(
                    f"{policy.name} measures how far layer {DEVIATION_LAYER} deviates; this model has layer 0 only",
                    field="policies",
                    limit=f"≥ {DEVIATION_LAYER + 1} layers",
                    actual=f"{adapter.num_layers} layers",
                )

    def run(self, cases: Sequence[Case], on_case: OnCase | None = None) -> dict[str, PolicyRun]:
        """Every policy on every case, by policy name in the order of `policies`.

        Raises `InvalidRequest` for cases this model cannot take, `NotSupported` where it cannot link, before any work.
        """
        check_cases(
            cases, vocab_size=self.adapter.vocab_size, max_context_tokens=self.adapter.support.max_context_tokens
        )
        if any(policy.needs_chunks for policy in self.policies):
            self.adapter.support.require_linked()
        num_blocks = max(blocks_for(case) for case in cases)
        self.engines = {
            sinks: EngineCore(
                self.adapter, self._decode, num_blocks=num_blocks, block_size=BLOCK_SIZE, num_sink_tokens=sinks
            )
            for sinks in sorted({policy.num_sink_tokens for policy in self.policies})
        }
        runs = {policy.name: PolicyRun() for policy in self.policies}
        gate = GenerationGate()
        for number, case in enumerate(cases, start=1):
            self._run_case(case, runs, gate)
            if on_case:
                on_case(number, len(cases))
        return runs

    def _run_case(self, case: Case, runs: dict[str, PolicyRun], gate: GenerationGate) -> None:
        passes: dict[str, _Pass] = {}
        ask = gate.open_questions(case)
        with ExitStack() as held:
            for sinks in sorted({policy.num_sink_tokens for policy in self.policies if policy.needs_chunks}):
                self._hold_chunks(held, self.engines[sinks], case)
            for policy in self.policies:
                started = time.perf_counter()
                passes[policy.name] = self._pass(policy, case, ask, runs[policy.name])
                runs[policy.name].seconds += time.perf_counter() - started
        gate.count(case, passes[REFERENCE].generated)
        for name, outcome in self._score(case, passes):
            runs[name].outcomes.append(outcome)

    def _hold_chunks(self, held: ExitStack, engine: EngineCore, case: Case) -> None:
        """Compiles what is not resident and keeps it until `held` closes: no policy pays for another's compile."""
        prompt = prompt_of(engine, case)
        parts = [index for index, part in enumerate(prompt.parts) if part.chunk_id is not None]
        held.callback(release_runs, engine.pool, list(chunk_runs(engine, prompt, parts).values()))

    def _pass(self, policy: Policy, case: Case, ask: Sequence[int], run: PolicyRun) -> _Pass:
        engine = self.engines[policy.num_sink_tokens]
        opened = policy.open(engine, case)
        with ExitStack() as open_contexts:
            open_contexts.callback(opened.context.close)
            run.recomputed_tokens += opened.recomputed_tokens
            run.reused_tokens += opened.reused_tokens
            forks = engine.fork(opened.context, [[*q.token_ids, *q.answer_ids[:-1]] for q in case.questions])
            forks.close()
            # Row i of a tail predicts its token i + 1: the last row of the question predicts the first answer token.
            hidden = [
                rows[len(question.token_ids) - 1 :].clone()
                for rows, question in zip(forks.hidden, case.questions, strict=True)
            ]
            generated = answer_questions(engine, self._decode, opened.context, case, ask) if ask else {}
        return _Pass(hidden, generated)

    def _score(self, case: Case, passes: dict[str, _Pass]) -> Iterator[tuple[str, Outcome]]:
        parts: dict[tuple[str, int], list[Outcome]] = defaultdict(list)
        for pieces in slices(case.questions, max(1, MAX_SLICE_LOGITS // self.adapter.vocab_size)):
            reference = self._distributions(passes[REFERENCE], pieces)
            for name, done in passes.items():
                own = reference if name == REFERENCE else self._distributions(done, pieces)
                for piece, distributions, full in zip(pieces, own, reference, strict=True):
                    question = case.questions[piece.index]
                    cut = replace(question, answer_ids=question.answer_ids[piece.start : piece.end])
                    outcome = score(replace(case, questions=(cut,)), 0, distributions, full)
                    parts[name, piece.index].append(outcome)
        for (name, index), outcomes in parts.items():
            found = passes[name].generated.get(index)
            joined = join(index, outcomes)
            yield name, replace(joined, exact=found.exact, f1=found.f1) if found else joined

    def _distributions(self, done: _Pass, pieces: Sequence[Piece]) -> list[Distributions]:
        logits = self.adapter.logits(torch.cat([done.hidden[p.index][p.start : p.end] for p in pieces]))
        whole = Distributions.of(logits)
        ends = list(accumulate((piece.end - piece.start for piece in pieces), initial=0))
        return [Distributions(whole.log_probs[a:b], whole.first_choices[a:b]) for a, b in pairwise(ends)]


@dataclass(frozen=True, slots=True)
class Piece:
    """Answer tokens `start` … `end` of question `index`."""

    index: int
    start: int
    end: int


def slices(questions: Sequence[Question], max_rows: int) -> Iterator[list[Piece]]:
    """All answer tokens in order, in lists of at most `max_rows`; a long answer is cut."""
    batch: list[Piece] = []
    room = max_rows
    for index, question in enumerate(questions):
        start = 0
        while start < len(question.answer_ids):
            end = min(len(question.answer_ids), start + room)
            batch.append(Piece(index, start, end))
            room -= end - start
            start = end
            if not room:
                yield batch
                batch, room = [], max_rows
    if batch:
        yield batch


def join(index: int, outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome of a question from those of its pieces, in order."""
    exacts = [outcome.exact for outcome in outcomes if outcome.exact is not None]
    return replace(
        outcomes[0],
        index=index,
        nll_sum=sum(outcome.nll_sum for outcome in outcomes),
        num_tokens=sum(outcome.num_tokens for outcome in outcomes),
        kls=tuple(kl for outcome in outcomes for kl in outcome.kls),
        num_agreed=sum(outcome.num_agreed for outcome in outcomes),
        exact=all(exacts) if exacts else None,
    )


def blocks_for(case: Case) -> int:
    """Pool blocks that no policy's passes over `case` exceed: chunks, two contexts, tails, and generated answers."""
    chunks = sum(-(-len(chunk) // BLOCK_SIZE) for chunk in case.chunks)
    context = -(-case.num_context_tokens // BLOCK_SIZE)
    tails = sum(-(-2 * question.num_tokens // BLOCK_SIZE) + 8 for question in case.questions)
    return 2 * (chunks + 2 * context + tails) + 64
