"""What every benchmark has in common: where it ran, its table, its JSON line."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spolia_fidelity.environment import environment


@dataclass(frozen=True, slots=True)
class Sample:
    """Times of one kind, in milliseconds."""

    values_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The figure to quote."""
        return statistics.median(self.values_ms)

    def percentile_ms(self, share: float) -> float:
        """The value that `share` (0 … 1) of the values do not exceed; nearest rank."""
        return sorted(self.values_ms)[max(0, math.ceil(share * len(self.values_ms)) - 1)]

    def __str__(self) -> str:
        return (
            f"{self.median_ms:.1f} ({min(self.values_ms):.1f} … {max(self.values_ms):.1f}, n = {len(self.values_ms)})"
        )


@dataclass(slots=True)
class Table:
    """A table of a report."""

    header: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)


@dataclass(slots=True)
class Report:
    """A benchmark's outcome. `question` is what it asks; `figures` become the fields of its JSON line.

    Printed are the table of `header` and `rows`, where there is one, and `tables`.
    """

    bench: str
    question: str
    setup: dict[str, Any]
    figures: dict[str, Any] = field(default_factory=dict)
    rows: list[Sequence[str]] = field(default_factory=list)
    header: Sequence[str] = ()
    tables: list[Table] = field(default_factory=list)

    def print(self, *, only_json: bool = False, out: Path | None = None) -> None:
        """Prints table and JSON line; with `out`, also writes the JSON there."""
        record = {"bench": self.bench, **self.figures, "setup": self.setup, "environment": environment()}
        if not only_json:
            print(f"\n{self.question}\n")
            for each in ([Table(self.header, self.rows)] if self.header else []) + self.tables:
                print(table(each.header, each.rows))
                print()
        print(json.dumps(record))
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(record, indent=2) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def progress(text: str) -> None:
    """A line of progress, kept off standard output."""
    print(text, file=sys.stderr, flush=True)
