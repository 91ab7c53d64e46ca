"""Answers that have to be generated: greedily, all questions of a case together, behind forks of one context."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spolia_core.sampling import SamplingParams
from spolia_engine.context import Context
from spolia_engine.core import EngineCore
from spolia_engine.next_tokens import accept_row
from spolia_engine.sequence import Sequence as DecodeSequence
from spolia_engine.sequence_starts import start_sequence
from spolia_engine.text import Decode
from spolia_fidelity.answers import best_f1, first_line, is_exact
from spolia_fidelity.case import Case, Question

MIN_ABLE_SHARE = 0.05
"""Below this share of right answers under full recompute a model cannot do a task, and no loss is reported."""
NUM_TRIES = 60
"""Wrong answers in a row, from the first, behind which a task is no longer asked: with none right of 60, the share of
right answers is below `MIN_ABLE_SHARE` at 95 % confidence (0.95^60 = 0.046)."""
SPARE_TOKENS = 8
"""Tokens an answer may be longer than the one that was scored."""


@dataclass(frozen=True, slots=True)
class Generated:
    """A generated answer, compared with the accepted ones."""

    text: str
    exact: bool
    f1: float


class GenerationGate:
    """Stops asking for answers of a task that the model cannot do: generating is what takes the time."""

    def __init__(self) -> None:
        self._asked: Counter[str] = Counter()
        self._right: Counter[str] = Counter()

    def open_questions(self, case: Case) -> list[int]:
        """Questions of a case whose answers are to be generated, the same for every policy."""
        return [
            index
            for index, question in enumerate(case.questions)
            if question.answers
            and not question.exact
            and (self._right[question.task] or self._asked[question.task] < NUM_TRIES)
        ]

    def count(self, case: Case, generated: Mapping[int, Generated]) -> None:
        """Takes note of full recompute's answers."""
        for index, answer in generated.items():
            self._asked[case.questions[index].task] += 1
            self._right[case.questions[index].task] += answer.exact


def answer_questions(
    engine: EngineCore, decode: Decode, context: Context, case: Case, indices: Sequence[int]
) -> dict[int, Generated]:
    """Greedy answers to these questions behind `context`, which stays open. Raises `Busy` when the pool has no room."""
    questions = [case.questions[index] for index in indices]
    forks = engine.fork(context, [question.token_ids for question in questions])
    waiting = list(forks.contexts)
    sequences: list[DecodeSequence] = []
    try:
        for question in questions:
            params = SamplingParams(max_tokens=_max_answer_tokens(engine, context, question), temperature=0.0)
            sequences.append(start_sequence(waiting.pop(0), engine.generation(params)))
        logits = engine.adapter.logits(_last_rows(forks.hidden))
        for sequence, row in zip(sequences, logits, strict=True):
            accept_row(sequence.generation, row)
        while running := [sequence for sequence in sequences if not sequence.finished]:
            for sequence, row in zip(running, engine.decoding.step_logits(running), strict=True):
                accept_row(sequence.generation, row)
    finally:
        engine.decoding.forget_plan()
        for context_left in waiting:
            context_left.close()
        for sequence in sequences:
            sequence.close()
    texts = [first_line(decode(sequence.generation.token_ids)) for sequence in sequences]
    return {
        index: Generated(text, is_exact(text, question.answers), best_f1(text, question.answers))
        for index, question, text in zip(indices, questions, texts, strict=True)
    }


def _max_answer_tokens(engine: EngineCore, context: Context, question: Question) -> int:
    """The scored answer's length and some, within the model's context; at least one, since the case was checked."""
    room = engine.adapter.max_context_tokens - context.num_tokens - len(question.token_ids)
    return min(len(question.answer_ids) + SPARE_TOKENS, room)


def _last_rows(hidden: Sequence[Tensor]) -> Tensor:
    return torch.stack([rows[-1] for rows in hidden])
