"""What every benchmark has in common: where it ran, its table, its JSON line."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Sample:
    """Times of one kind, in milliseconds."""

    values_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The figure to quote."""
        return statistics.median(self.values_ms)

    def __str__(self) -> str:
        return (
            f"{self.median_ms:.1f} ({min(self.values_ms):.1f} … {max(self.values_ms):.1f}, n = {len(self.values_ms)})"
        )


@dataclass(slots=True)
class Report:
    """A benchmark's outcome. `question` is what it asks; `figures` become the fields of its JSON line."""

    bench: str
    question: str
    setup: dict[str, Any]
    figures: dict[str, Any] = field(default_factory=dict)
    rows: list[Sequence[str]] = field(default_factory=list)
    header: Sequence[str] = ()

    def print(self, *, only_json: bool = False, out: Path | None = None) -> None:
        """Prints table and JSON line; with `out`, also writes the JSON there."""
        record = {"bench": self.bench, **self.figures, "setup": self.setup, "environment": environment()}
        if not only_json:
            print(f"\n{self.question}\n")
            print(table(self.header, self.rows))
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


def environment() -> dict[str, Any]:
    """Hardware, versions and commit: what a figure is worth nothing without."""
    import torch
    import transformers

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }


def cpu_name() -> str:
    """The processor's own name, where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the working tree, marked when it has changes; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10, check=True
        ).stdout

    try:
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def progress(text: str) -> None:
    """A line of progress, kept off standard output."""
    print(text, file=sys.stderr, flush=True)
