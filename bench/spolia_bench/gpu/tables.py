"""The tables of `docs/gpu.md` from a result file: `python -m spolia_bench.gpu.tables FILE` prints them; with a PAGE it
writes them there, where each stands, with a line that says where it was measured, between two comments.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
COMPETITORS = ("flashinfer", "flex", "flash2_private")
"""What does a decode step's attention in the place of ours."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A table: title and field of each column, how a number is shown, and what its figures are medians of."""

    columns: Sequence[tuple[str, str]]
    shown: Callable[[str, float], str]
    counts: str


def tables(result: Row) -> Iterator[str]:
    """Markdown lines of every table that the result has, its line of origin before it."""
    for name in LAYOUTS:
        if result.get(name):
            yield from _lines(name, result)
            yield ""


def written(page: str, result: Row) -> str:
    """`page` with every table that the result has, in the place of the one there. Raises ValueError where none is."""
    for name in LAYOUTS:
        if result.get(name):
            begin, end = f"<!-- table: {name} -->\n", "<!-- end -->"
            before, found, rest = page.partition(begin)
            _, ended, after = rest.partition(end)
            if not found or not ended:
                raise ValueError(f"no place for the table {name!r}")
            page = before + begin + "\n".join(_lines(name, result)) + "\n\n" + end + after
    return page


def _of_steps(key: str, value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if not key.endswith("_ms"):
        return f"{value:.2f}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _of_engine(key: str, value: float) -> str:
    return f"{value:,.0f}" if isinstance(value, int) or key.endswith(("_mib", "_kib")) else f"{value:.1f}"


def _in_us(key: str, value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{1e3 * value:,.0f}" if key.endswith("_ms") else f"{value:.2f}"


LAYOUTS = {
    "steps": Layout(
        (
            ("model", "model"),
            ("rows × shared", "point"),
            ("private ms", "private_ms"),
            ("shared ms", "shared_ms"),
            ("no attention ms", "no_attention_ms"),
            ("no tails ms", "no_tails_ms"),
            ("floor ms", "floor_ms"),
            ("private / shared", "private_over_shared"),
            ("shared / floor", "step_over_floor"),
            ("permuted / shared", "permuted_over_shared"),
            ("share of copy rate", "bandwidth_share"),
        ),
        _of_steps,
        "of up to 32 steps, of 4 where private takes long",
    ),
    "linked": Layout(
        (
            ("model", "model"),
            ("documents × tokens", "point"),
            ("rows computed", "rows"),
            ("linked ms", "linked_ms"),
            ("full recompute ms", "recompute_ms"),
            ("floor ms", "floor_ms"),
            ("recompute / linked", "recompute_over_linked"),
            ("linked / floor", "linked_over_floor"),
        ),
        _of_steps,
        "of 7",
    ),
    "engine": Layout(
        (
            ("model", "model"),
            ("rows × shared", "point"),
            ("engine's step ms", "step_ms"),
            ("its graph ms", "graph_ms"),
            ("host's share ms", "host_ms"),
            ("steps not captured", "eager_steps"),
            ("start s", "start_s"),
            ("taken MiB", "taken_mib"),
            ("foreseen MiB", "foreseen_mib"),
            ("KiB a prompt's row", "row_kib"),
        ),
        _of_engine,
        "of 16",
    ),
    "sampling": Layout(
        (
            ("vocabulary", "vocab"),
            ("logits", "spread"),
            ("rows", "rows"),
            ("greedy µs", "greedy_ms"),
            ("temperature 1 µs", "temperature_ms"),
            ("and top-k 40 µs", "top_k_ms"),
            ("and top-p 0.9 µs", "top_p_ms"),
            ("floor µs", "floor_ms"),
        ),
        _in_us,
        "of 10",
    ),
    "attention": Layout(
        (
            ("heads", "heads"),
            ("rows × shared + suffix", "point"),
            ("Spolia, shared µs", "shared_ms"),
            ("Spolia, private µs", "private_ms"),
            ("FlashInfer cascade µs", "flashinfer_ms"),
            ("FlexAttention µs", "flex_ms"),
            ("FlashAttention-2, private µs", "flash2_private_ms"),
            ("best of these three / Spolia", "best_over_shared"),
            ("cuDNN, span alone µs", "cudnn_span_only_ms"),
            ("FlashAttention-2, span alone µs", "flash2_span_only_ms"),
            ("share of roofline", "roofline"),
        ),
        _in_us,
        "of 20 (Spolia, shared), 5 (private) and 10",
    ),
}


def _lines(name: str, result: Row) -> Iterator[str]:
    layout = LAYOUTS[name]
    yield f"{_origin(result)} Medians {layout.counts}."
    yield ""
    yield "| " + " | ".join(title for title, _ in layout.columns) + " |"
    yield "|" + "---|" * len(layout.columns)
    rows = result[name]
    models = list(dict.fromkeys(row[layout.columns[0][1]] for row in rows))
    for row in sorted(rows, key=lambda row: models.index(row[layout.columns[0][1]])):
        yield "| " + " | ".join(_cell(layout, key, _with_best(row).get(key)) for _, key in layout.columns) + " |"


def _origin(result: Row) -> str:
    """Hardware, versions, commit and rates, as far as the result says."""
    where, device, rates = result["environment"], result.get("report", {}), result["rates"]
    versions = [f"torch {where['torch']}", f"transformers {where['transformers']}"]
    versions += [f"{name} {device[name]}" for name in ("triton", "cuda") if device.get(name)]
    processors = f" ({device['multiprocessors']} multiprocessors)" if device else ""
    return (
        f"{result['device']}{processors}, bfloat16, {', '.join(versions)}, commit `{where['commit']}`; copies at "
        f"{rates['copy_tb_per_s']:.2f} TB/s, products at {rates['matrix_tflop_per_s']:.0f} TFLOP/s."
    )


def _cell(layout: Layout, key: str, value: float | str | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value.replace("x", " × ").replace("+", " + ") if key == "point" else value
    return layout.shown(key, value)


def _with_best(row: Row) -> Row:
    """With the ratio of the fastest other to ours, where each of them was measured or said why it could not be."""
    said = all(f"{name}_ms" in row or f"{name}_error" in row for name in COMPETITORS)
    times = [row[f"{name}_ms"] for name in COMPETITORS if f"{name}_ms" in row]
    if not said or not times or "shared_ms" not in row:
        return row
    return {**row, "best_over_shared": min(times) / row["shared_ms"]}


def main(argv: Sequence[str]) -> None:
    """See the module."""
    result = json.loads(Path(argv[0]).read_text())
    if len(argv) == 1:
        print("\n".join(tables(result)))
        return
    page = Path(argv[1])
    page.write_text(written(page.read_text(), result))


if __name__ == "__main__":
    main(sys.argv[1:])
