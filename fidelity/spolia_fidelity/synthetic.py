"""Generated contexts with the tasks of `spolia_fidelity.tasks`, as cases."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from spolia_core.errors import InvalidRequest
from spolia_fidelity.case import Case, Question
from spolia_fidelity.case_set import CaseSet, describe
from spolia_fidelity.encoder import TextEncoder
from spolia_fidelity.inputs.naming import SYNTHETIC
from spolia_fidelity.tasks import PLAIN_STYLE, Corpus, Style, make_corpus
from spolia_fidelity.tasks import Question as TaskQuestion

MAX_PER_CONTEXT = {"fact": 5, "two_hop": 4}
"""Questions of a task asked about one context; of those not named, all. Single facts are many and cheap to state: more
of them from one context would add little, since questions about one context err together."""
SAMPLE_PARTS = 16
SEEDS_PER_RUN = 1_000_000
MAX_SIZE_ERROR = 0.2
"""How far parts may be from the tokens asked for, on average, as a share of them."""
MANY_WORDS = 1_000
"""More words than the sentences that fill a part have."""


def synthetic_cases(
    encoder: TextEncoder,
    *,
    seed: int,
    num_questions: int,
    num_chunks: int,
    chunk_tokens: int,
    generate: bool = False,
    style: Style = PLAIN_STYLE,
) -> CaseSet:
    """Contexts of `num_chunks` parts of about `chunk_tokens` tokens, until there are `num_questions` questions.

    Names are held out from training. Every part but the last goes on in the next one (`cuts` is 1, where `style` has
    less), so that each context asks as many questions across a border as it can. With `generate`, answers are decoded
    and compared as words; else every token of them, and the end of sequence, has to be the model's first choice. A
    function of its arguments. Raises `InvalidRequest` for counts below 1, seeds below 0, and parts that this tokenizer
    makes more than `MAX_SIZE_ERROR` longer or shorter than asked for: facts take their room, and sentences run out.
    """
    counts = {"questions": num_questions, "chunks": num_chunks, "chunk_tokens": chunk_tokens}
    for name, count in counts.items():
        if count < 1:
            raise InvalidRequest(f"{name} must be ≥ 1, got {count}", field=name, limit="≥ 1", actual=str(count))
    if seed < 0:
        raise InvalidRequest(f"seed must be ≥ 0, got {seed}", field="seed", limit="≥ 0", actual=str(seed))
    style = replace(style, cuts=1.0, part_words=_part_words(encoder, chunk_tokens, style))
    cases: list[Case] = []
    left = num_questions
    for number in range(num_questions):
        corpus = make_corpus(seed * SEEDS_PER_RUN + number, num_chunks, style=style)
        case = _case(encoder, f"synthetic-{number}", corpus, left, generate)
        cases.append(case)
        left -= len(case.questions)
        if left < 1:
            break
    sizes = [len(chunk) for case in cases for chunk in case.chunks]
    mean = sum(sizes) / len(sizes)
    if abs(mean - chunk_tokens) > MAX_SIZE_ERROR * chunk_tokens:
        raise _out_of_reach(encoder, num_chunks, chunk_tokens, mean, style)
    notes = (
        f"parts of {min(sizes)} to {max(sizes)} tokens, {mean:.0f} on average",
        "at most " + ", ".join(f"{count} {task}" for task, count in MAX_PER_CONTEXT.items()) + " questions per context",
    )
    return describe(SYNTHETIC, SYNTHETIC, cases, num_records=num_questions - left, notes=notes)


def _part_words(encoder: TextEncoder, chunk_tokens: int, style: Style) -> int:
    """Words per part that make about `chunk_tokens` tokens, measured on a sample of this tokenizer."""
    sample = make_corpus(0, SAMPLE_PARTS, style=style)
    num_words = sum(len(part.split()) for part in sample.parts)
    num_tokens = sum(map(len, encoder.encode_all(sample.parts)))
    return max(1, round(chunk_tokens * num_words / num_tokens))


def _out_of_reach(
    encoder: TextEncoder, num_chunks: int, chunk_tokens: int, mean: float, style: Style
) -> InvalidRequest:
    """Names what parts without filling, and parts with all of it, have on average in this tokenizer."""

    def mean_tokens(part_words: int) -> int:
        sized = replace(style, part_words=part_words)
        corpora = [make_corpus(seed, num_chunks, style=sized) for seed in range(max(1, SAMPLE_PARTS // num_chunks))]
        sizes = [len(ids) for corpus in corpora for ids in encoder.encode_all(corpus.parts)]
        return round(sum(sizes) / len(sizes))

    least, most = mean_tokens(1), mean_tokens(MANY_WORDS)
    return InvalidRequest(
        f"--chunk-tokens {chunk_tokens}: generated parts would have {mean:.0f} tokens on average; with this model's "
        f"tokenizer, {least} to {most} can be had (--questions 0 leaves generated texts out)",
        field="chunk-tokens",
        limit=f"about {least} to {most}",
        actual=str(chunk_tokens),
    )


def _case(encoder: TextEncoder, name: str, corpus: Corpus, most: int, generate: bool) -> Case:
    chunks = tuple(encoder.encode_all(corpus.parts))
    questions = tuple(_question(encoder, question, generate) for question in _chosen(corpus.questions))
    return Case(name, encoder.bos_ids, chunks, questions[:most])


def _chosen(questions: Sequence[TaskQuestion]) -> Iterator[TaskQuestion]:
    """In the corpus's random order, up to `MAX_PER_CONTEXT` of each task."""
    taken: Counter[str] = Counter()
    for question in questions:
        taken[question.task] += 1
        if taken[question.task] <= MAX_PER_CONTEXT.get(question.task, math.inf):
            yield question


def _question(encoder: TextEncoder, question: TaskQuestion, generate: bool) -> Question:
    asked, answer = encoder.encode_all([question.text, f" {question.answer}"])
    if generate:
        return Question(question.task, asked, answer, exact=False, answers=(question.answer,))
    return Question(question.task, asked, (*answer, *encoder.eos_ids), exact=True)
