"""The tables of `docs/gpu.md` from a result file: `python -m spolia_bench.gpu.tables FILE`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

STEPS = (
    ("model", "model"),
    ("rows × shared", "point"),
    ("private ms", "private_ms"),
    ("shared ms", "shared_ms"),
    ("no attention ms", "no_attention_ms"),
    ("floor ms", "floor_ms"),
    ("private / shared", "private_over_shared"),
    ("shared / floor", "step_over_floor"),
    ("permuted / shared", "permuted_over_shared"),
)
ATTENTION = (
    ("heads", "heads"),
    ("rows × shared + suffix", "point"),
    ("Spolia, shared µs", "shared_ms"),
    ("Spolia, private µs", "private_ms"),
    ("FlashInfer cascade µs", "flashinfer_ms"),
    ("FlexAttention µs", "flex_ms"),
    ("cuDNN, span alone µs", "cudnn_span_only_ms"),
    ("FlashAttention-2, span alone µs", "flash2_span_only_ms"),
    ("share of roofline", "roofline"),
)
LINKED = (
    ("model", "model"),
    ("documents × tokens", "point"),
    ("rows computed", "rows"),
    ("linked ms", "linked_ms"),
    ("full recompute ms", "recompute_ms"),
    ("floor ms", "floor_ms"),
    ("recompute / linked", "recompute_over_linked"),
    ("linked / floor", "linked_over_floor"),
)


def tables(result: Mapping[str, Any]) -> Iterator[str]:
    """Markdown lines of every table that the result has."""
    for name, columns, shown in (
        ("steps", STEPS, _of_steps),
        ("linked", LINKED, _of_steps),
        ("attention", ATTENTION, _of_attention),
    ):
        if name in result:
            yield from _table(columns, result[name], shown)
            yield ""


def _of_steps(key: str, value: float) -> str:
    if key == "rows":
        return f"{value:,}"
    if not key.endswith("_ms"):
        return f"{value:.2f}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _of_attention(key: str, value: float) -> str:
    return f"{value:.2f}" if key == "roofline" else f"{1e3 * value:,.0f}"


def _table(
    columns: Sequence[tuple[str, str]], rows: Sequence[Mapping[str, Any]], shown: Callable[[str, float], str]
) -> Iterator[str]:
    yield "| " + " | ".join(title for title, _ in columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        cells = [row.get(key) for _, key in columns]
        keys = [key for _, key in columns]
        yield (
            "| "
            + " | ".join(
                ""
                if cell is None
                else cell.replace("x", " × ").replace("+", " + ")
                if isinstance(cell, str)
                else shown(key, cell)
                for key, cell in zip(keys, cells, strict=True)
            )
            + " |"
        )


if __name__ == "__main__":
    print("\n".join(tables(json.loads(Path(sys.argv[1]).read_text()))))
