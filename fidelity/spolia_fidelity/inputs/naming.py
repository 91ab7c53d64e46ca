"""What files are called in results: no two alike, and none like what is generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from spolia_fidelity.inputs.reading import stem_of
from spolia_fidelity.result import ALL_TASKS
from spolia_fidelity.tasks.corpus import TASKS

SYNTHETIC = "synthetic"
"""The source of generated texts."""


@dataclass(frozen=True, slots=True)
class SourceName:
    """A file's name as a source of cases, and the task its questions belong to, or begin with and a slash."""

    name: str
    task: str


def source_names(paths: Sequence[Path]) -> tuple[SourceName, ...]:
    """Names of files that are measured together, in order.

    A source is called by its file's name, a task by that name's stem: "book.txt", "book". What is taken, by an earlier
    file or by what is generated ("fact", "all"), is called by the whole file name, or by that and a number.
    """
    names, tasks = {SYNTHETIC}, {SYNTHETIC, ALL_TASKS, *TASKS}
    found = []
    for path in paths:
        name = next(name for name in _numbered(path.name) if name not in names)
        task = next(task for task in _candidates(path, name) if task not in tasks)
        names.add(name)
        tasks.add(task)
        found.append(SourceName(name, task))
    return tuple(found)


def _candidates(path: Path, name: str) -> Iterator[str]:
    yield stem_of(path)
    yield from _numbered(name)


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}-{number}" for number in count(2))
