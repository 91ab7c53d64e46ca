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
    ("cuDNN, span alone µs", "cudnn_span_only_ms"),
    ("FlashAttention-2, span alone µs", "flash2_span_only_ms"),
    ("share of roofline", "roofline"),
)


def tables(result: Mapping[str, Any]) -> Iterator[str]:
    """Markdown lines of both tables."""
    yield from _table(STEPS, result["steps"], _of_steps)
    yield ""
    yield from _table(ATTENTION, result["attention"], _of_attention)


def _of_steps(key: str, value: float) -> str:
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
