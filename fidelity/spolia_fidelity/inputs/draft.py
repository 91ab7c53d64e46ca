"""A case as text, before it is encoded; and one field of a record, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from spolia_core.errors import InvalidRequest
from spolia_fidelity.inputs.reading import Record

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DraftQuestion:
    """Question text up to where the answer begins, the answer to score, and those accepted when generated."""

    task: str
    text: str
    answer: str
    """Scored behind `text`, a space between them, end of sequence after it."""
    answers: tuple[str, ...] = ()
    """Not empty: the task's exact match needs a generated answer. Empty: teacher forcing tells."""


@dataclass(frozen=True, slots=True)
class Draft:
    """One context as text, and its questions."""

    name: str
    chunks: tuple[str, ...]
    questions: tuple[DraftQuestion, ...]
    cluster: str = ""


@dataclass(frozen=True, slots=True)
class Drafts:
    """What a layout makes of a file: units in any order, each some drafts that belong together, made when asked for."""

    layout: str
    num_questions: int
    units: tuple[Callable[[], Iterator[Draft]], ...]
    notes: tuple[str, ...] = ()


def ask(question: str) -> str:
    """The text of a live question; the answer follows behind a space."""
    return f"Question: {question.strip()}\nAnswer:"


def get(record: Record, field: str, kind: type[T], where: str) -> T:
    """A record's field. Raises `InvalidRequest`, naming both, where it is missing, empty or of another kind."""
    value: Any = record.get(field)
    if not isinstance(value, kind) or not value:
        raise InvalidRequest(
            f"{where}: {field} is not a {kind.__name__} with something in it",
            field=f"{where}.{field}",
            limit=kind.__name__,
            actual="missing" if field not in record else repr(value)[:40],
        )
    return value


def pair(item: Any, where: str) -> tuple[Any, Any]:
    """Both members of a list of two. Raises `InvalidRequest`, naming the record, for anything else."""
    if not isinstance(item, list) or len(item) != 2:
        raise InvalidRequest(f"{where}: not a pair", field=where, limit="[first, second]", actual=repr(item)[:40])
    return item[0], item[1]


def passage(record: Any, where: str) -> str:
    """Title, if any, and text of a `{title, text}` object, as a chunk's text."""
    if not isinstance(record, dict):
        raise InvalidRequest(f"{where}: not a passage", field=where, limit="{title, text}", actual=repr(record)[:40])
    return titled(str(record.get("title") or ""), get(record, "text", str, where))


def titled(title: str, text: str) -> str:
    """A passage as a chunk's text: title line, text, an empty line."""
    return f"{title.strip()}\n{text.strip()}\n\n" if title.strip() else f"{text.strip()}\n\n"
