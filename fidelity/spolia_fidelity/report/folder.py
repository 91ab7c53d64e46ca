"""A report as files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spolia_core.errors import InvalidRequest
from spolia_fidelity.report.json_line import json_line
from spolia_fidelity.report.markdown import markdown_report
from spolia_fidelity.report.plot import Limits, loss_plot
from spolia_fidelity.result import EvalResult


@dataclass(frozen=True, slots=True)
class ReportFiles:
    """Where a report was written."""

    markdown: Path
    plot: Path
    json: Path


def write_report(result: EvalResult, folder: Path, limits: Limits | None = None) -> ReportFiles:
    """Writes `report.md`, `loss.svg` and `result.json` into `folder`, made where it is missing, over older ones.

    Raises `InvalidRequest` when the folder cannot be written.
    """
    files = ReportFiles(folder / "report.md", folder / "loss.svg", folder / "result.json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.markdown.write_text(markdown_report(result, files.plot.name), encoding="utf-8")
        files.plot.write_text(loss_plot(result, limits), encoding="utf-8")
        files.json.write_text(f"{json_line(result)}\n", encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(
            f"cannot write a report into {folder}: {error.strerror}", field="report", actual=str(folder)
        ) from error
    return files
