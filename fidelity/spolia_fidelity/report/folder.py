"""A report as files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

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


def check_folder(folder: Path) -> None:
    """Makes the folder where it is missing and tries a file in it: known before a run, not after it.

    Raises `InvalidRequest` when the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _not_written(folder, error) from error


def write_report(result: EvalResult, folder: Path, limits: Limits | None = None) -> ReportFiles:
    """Writes `report.md`, `loss.svg` and `result.json` into `folder`, made where it is missing, over older ones.

    Raises `InvalidRequest` when the folder cannot be written.
    """
    files = ReportFiles(folder / "report.md", folder / "loss.svg", folder / "result.json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.markdown.write_text(markdown_report(result, files.plot.name), encoding="utf-8", errors="replace")
        files.plot.write_text(loss_plot(result, limits), encoding="utf-8", errors="replace")
        files.json.write_text(f"{json_line(result)}\n", encoding="utf-8")
    except OSError as error:
        raise _not_written(folder, error) from error
    return files


def _not_written(folder: Path, error: OSError) -> InvalidRequest:
    return InvalidRequest(
        f"cannot write a report into {folder}: {error.strerror or error}", field="report", actual=str(folder)
    )
