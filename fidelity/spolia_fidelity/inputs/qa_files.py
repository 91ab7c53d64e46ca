"""Which QA layout records have, told by their fields; and drafts made into cases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from random import Random

from spolia_core.errors import InvalidRequest
from spolia_fidelity.case import Case, Question
from spolia_fidelity.case_set import CaseSet, describe
from spolia_fidelity.encoder import TextEncoder
from spolia_fidelity.inputs.draft import Draft, Drafts
from spolia_fidelity.inputs.lists import babi, kv_retrieval
from spolia_fidelity.inputs.options import InputOptions
from spolia_fidelity.inputs.passages import hotpotqa, musique, nq_open
from spolia_fidelity.inputs.reading import Record

LAYOUTS = (
    (("ordered_kv_records", "key", "value"), kv_retrieval),
    (("ctxs", "question", "answers", "nq_annotated_gold"), nq_open),
    (("ctxs", "question", "answers"), musique),
    (("context", "question", "answer", "supporting_facts"), hotpotqa),
    (("file", "text"), babi),
)
"""Fields that tell a layout, the most telling first."""


def is_qa(record: Record) -> bool:
    """Whether a record has one of the QA layouts."""
    return any(all(field in record for field in fields) for fields, _ in LAYOUTS)


def qa_drafts(task: str, records: Sequence[Record], options: InputOptions) -> Drafts:
    """What the records' layout makes of them. Raises `InvalidRequest`, with the fields seen, when there is none."""
    for fields, layout in LAYOUTS:
        if all(field in records[0] for field in fields):
            return layout(task, records, options)
    known = "; ".join(", ".join(fields) for fields, _ in LAYOUTS)
    seen = ", ".join(records[0]) or "none"
    raise InvalidRequest(
        f"{task}: no known layout has the fields {seen}", field="input", limit=f"{known}; text", actual=seen
    )


def qa_cases(name: str, drafts: Drafts, encoder: TextEncoder, options: InputOptions) -> CaseSet:
    """Encodes drafts until `max_cases` fit the context; where that is fewer than there are, units come in random order.

    Cases that do not fit are counted, and never cut. Raises `InvalidRequest`, with the shortest, when none fits.
    """
    units = list(drafts.units)
    if options.max_cases is not None:
        Random(f"units {options.seed}").shuffle(units)
    maker = _CaseMaker(encoder, options)
    cases: list[Case] = []
    for case in maker.fitting(chain.from_iterable(unit() for unit in units)):
        cases.append(case)
        if len(cases) == options.max_cases:
            break
    if not cases:
        raise InvalidRequest(
            f"{name}: no context fits {options.max_context_tokens} tokens; the shortest has {maker.shortest}; "
            "--passage-tokens cuts passages",
            field="input",
            limit=f"{options.max_context_tokens} tokens",
            actual=f"{maker.shortest} tokens",
        )
    notes = [*drafts.notes, *maker.notes()]
    if len(cases) == options.max_cases:
        notes.append(f"Stopped at {len(cases)} cases, drawn at random (seed {options.seed}).")
    return describe(
        name, drafts.layout, cases, num_records=drafts.num_questions, num_skipped=maker.num_skipped, notes=notes
    )


class _CaseMaker:
    """Encodes drafts and counts what was cut or left out."""

    def __init__(self, encoder: TextEncoder, options: InputOptions) -> None:
        self._encoder, self._options = encoder, options
        self.num_skipped = 0
        self.shortest: int | None = None
        self._num_cut = 0
        self._num_chunks = 0

    def fitting(self, drafts: Iterator[Draft]) -> Iterator[Case]:
        """Cases that fit the context, in order."""
        for draft in drafts:
            case, num_cut = self._encoded(draft)
            self.shortest = min(self.shortest or case.num_tokens, case.num_tokens)
            if case.num_tokens > self._options.max_context_tokens:
                self.num_skipped += len(case.questions)
                continue
            self._num_cut += num_cut
            self._num_chunks += len(case.chunks)
            yield case

    def notes(self) -> list[str]:
        """What a reader of the figures has to know."""
        limit = self._options.max_context_tokens
        notes = []
        if self.num_skipped:
            notes.append(f"{self.num_skipped} questions left out: their context exceeds {limit} tokens.")
        if self._num_cut:
            cut = self._options.max_chunk_tokens
            notes.append(f"{self._num_cut} of {self._num_chunks} chunks cut to {cut} tokens; answers may stand behind.")
        return notes

    def _encoded(self, draft: Draft) -> tuple[Case, int]:
        longest = self._options.max_chunk_tokens
        whole = self._encoder.encode_all(draft.chunks)
        texts = [text for question in draft.questions for text in (question.text, f" {question.answer}")]
        encoded = iter(self._encoder.encode_all(texts))
        questions = tuple(
            Question(
                task=question.task,
                token_ids=next(encoded),
                answer_ids=next(encoded) + self._encoder.eos_ids,
                exact=not question.answers,
                answers=question.answers,
            )
            for question in draft.questions
        )
        chunks = tuple(chunk[:longest] for chunk in whole)
        case = Case(draft.name, self._encoder.bos_ids, chunks, questions, draft.cluster)
        return case, sum(len(chunk) < len(other) for chunk, other in zip(chunks, whole, strict=True))
