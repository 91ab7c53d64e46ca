"""QA records with passages: MuSiQue as in CacheBlend's file, HotpotQA, and NQ-open with one passage a record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from random import Random

from spolia_fidelity.inputs.draft import Draft, DraftQuestion, Drafts, ask, get, pair, passage, titled
from spolia_fidelity.inputs.options import InputOptions
from spolia_fidelity.inputs.reading import Record


def musique(task: str, records: Sequence[Record], options: InputOptions) -> Drafts:
    """`{ctxs: [{title, text}], question, answers}`: one case a record, a chunk a passage, in the record's order."""
    return Drafts("musique", len(records), _each(_musique_draft, task, records))


def hotpotqa(task: str, records: Sequence[Record], options: InputOptions) -> Drafts:
    """`{context: [[title, [sentence]]], question, answer}`: one case a record, a chunk a passage."""
    return Drafts("hotpotqa", len(records), _each(_hotpot_draft, task, records))


def nq_open(task: str, records: Sequence[Record], options: InputOptions) -> Drafts:
    """`{ctxs: [one passage], question, answers}`: contexts of `num_passages` records, drawn together by the seed.

    Every record's question is asked behind the whole context, so each passage is the others' distractor and a context
    is computed once for all its questions. Records that are left over after the last whole context are not used.
    """
    order = Random(f"contexts {options.seed}").sample(range(len(records)), len(records))
    size = min(options.num_passages, len(order))
    groups = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    left = len(order) - size * len(groups)
    notes = (
        f"Contexts of {size} passages drawn from different records (seed {options.seed}); all their questions are asked"
        f" behind each; {left} left-over records are not used.",
    )
    units = tuple(partial(_nq_draft, task, records, group, index) for index, group in enumerate(groups))
    return Drafts("nq-open", len(records), units, notes)


def _each(
    make: Callable[[str, Record, int], Draft], task: str, records: Sequence[Record]
) -> tuple[Callable[[], Iterator[Draft]], ...]:
    def one(record: Record, index: int) -> Iterator[Draft]:
        yield make(task, record, index)

    return tuple(partial(one, record, index) for index, record in enumerate(records))


def _musique_draft(task: str, record: Record, index: int) -> Draft:
    where = f"record {index}"
    chunks = tuple(passage(ctx, where) for ctx in get(record, "ctxs", list, where))
    return Draft(f"{task}/{index}", chunks, (_question(task, record, where),))


def _hotpot_draft(task: str, record: Record, index: int) -> Draft:
    where = f"record {index}"
    pairs = [pair(item, where) for item in get(record, "context", list, where)]
    chunks = tuple(titled(str(title), "".join(str(sentence) for sentence in sentences)) for title, sentences in pairs)
    answer = get(record, "answer", str, where)
    question = DraftQuestion(task, ask(get(record, "question", str, where)), answer, (answer,))
    return Draft(f"{task}/{index}", chunks, (question,))


def _nq_draft(task: str, records: Sequence[Record], group: Sequence[int], index: int) -> Iterator[Draft]:
    chunks: dict[str, None] = {}  # in order; a passage of two records stands in the context once
    for record_index in group:
        where = f"record {record_index}"
        chunks.update((passage(ctx, where), None) for ctx in get(records[record_index], "ctxs", list, where))
    questions = tuple(_question(task, records[i], f"record {i}") for i in group)
    yield Draft(f"{task}/{index}", tuple(chunks), questions)


def _question(task: str, record: Record, where: str) -> DraftQuestion:
    answers = tuple(str(answer) for answer in get(record, "answers", list, where))
    return DraftQuestion(task, ask(get(record, "question", str, where)), answers[0], answers)
