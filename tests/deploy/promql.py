"""The metrics that a PromQL expression names, with the labels it asks for; as much of the language as we write."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ADDED = {"namespace", "pod", "instance", "job", "le"}
"""Labels that the Prometheus operator and histograms add."""

_ROW = re.compile(r"\| `(?P<name>spolia_\w+)(\{(?P<labels>[\w,]+)\})?` \| (?P<kind>\w+) \| (?P<roles>[\w, ]+) \| .+ \|")
_NAME = re.compile(r"\b(spolia_[a-z0-9_]+)(?:\{([^}]*)\})?")
_BY = re.compile(r"\bby \(([^)]*)\)")


@dataclass(frozen=True)
class Metric:
    """A row of docs/observability.md, which a test holds against the nodes' registries."""

    labels: frozenset[str]
    kind: str
    roles: frozenset[str]


def documented() -> dict[str, Metric]:
    found = {}
    for row in map(_ROW.fullmatch, (ROOT / "docs" / "observability.md").read_text().splitlines()):
        if row is not None:
            labels = frozenset((row["labels"] or "").split(",")) - {""}
            found[row["name"]] = Metric(labels, row["kind"], frozenset(row["roles"].split(", ")))
    assert len(found) > 50
    return found


def series_in(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Names, and the labels asked for: those of the selector and of every `by`."""
    by = {label.strip() for labels in _BY.findall(expression) for label in labels.split(",")}
    for name, selector in _NAME.findall(expression):
        yield name, by | {part.split("=")[0].strip().rstrip("!~") for part in selector.split(",") if part}


def check(expression: str, known: dict[str, Metric]) -> None:
    """Fails for a metric or a label that no node has."""
    found = list(series_in(expression))
    assert found, f"no metric in {expression}"
    for name, labels in found:
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        is_part = base != name and base in known and known[base].kind == "histogram"
        assert is_part or name in known, f"{name} in {expression}"
        assert labels <= known[base if is_part else name].labels | ADDED, expression
