"""Cases with what is known about where they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spolia_fidelity.case import Case


@dataclass(frozen=True, slots=True)
class InputInfo:
    """One source of cases, as reports name it."""

    name: str
    """As the caller named it: a file's name, or "synthetic"."""
    layout: str
    """What it was read as: "text", "musique", "synthetic", …"""
    num_records: int
    """Questions the source could give; for what is generated or cut from text, as many as were made."""
    num_skipped: int
    """Questions left out because their context exceeds the model's."""
    num_cases: int
    num_clusters: int
    """Independent units among the cases: what is resampled."""
    num_questions: int
    num_chunks: int
    num_chunk_tokens: int
    num_scored_tokens: int
    notes: tuple[str, ...] = ()
    """What was cut, drawn or left out, in sentences."""


@dataclass(frozen=True, slots=True)
class CaseSet:
    """Cases of one source."""

    cases: tuple[Case, ...]
    info: InputInfo


def describe(
    name: str,
    layout: str,
    cases: Sequence[Case],
    *,
    num_records: int,
    num_skipped: int = 0,
    notes: Sequence[str] = (),
) -> CaseSet:
    """The cases with their counts taken."""
    questions = [question for case in cases for question in case.questions]
    info = InputInfo(
        name=name,
        layout=layout,
        num_records=num_records,
        num_skipped=num_skipped,
        num_cases=len(cases),
        num_clusters=len({case.cluster_name for case in cases}),
        num_questions=len(questions),
        num_chunks=sum(len(case.chunks) for case in cases),
        num_chunk_tokens=sum(case.num_chunk_tokens for case in cases),
        num_scored_tokens=sum(len(question.answer_ids) for question in questions),
        notes=tuple(notes),
    )
    return CaseSet(tuple(cases), info)
