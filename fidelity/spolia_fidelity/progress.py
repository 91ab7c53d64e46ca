"""How far a run is, on standard error; nothing where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

Advance = Callable[[int, int], None]
"""Takes how many are done, of how many."""


class Progress:
    """Notes and bars on standard error. Silent where that is no terminal, or where `wanted` is False."""

    def __init__(self, wanted: bool = True) -> None:
        self._shown = wanted and sys.stderr.isatty()
        self._console = Console(stderr=True, highlight=False)

    def note(self, text: str) -> None:
        """Says what comes next."""
        if self._shown:
            self._console.print(text, style="dim")

    @contextmanager
    def bar(self, text: str, total: int) -> Iterator[Advance]:
        """A bar that the caller moves, with the time it is likely to take."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=self._console, disable=not self._shown, transient=True) as shown:
            task = shown.add_task(text, total=total)
            yield lambda done, _: shown.update(task, completed=done)
