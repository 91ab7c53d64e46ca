"""`spolia warm`: compute documents before anyone asks about them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from spolia.cli.corpus import CorpusReport, CorpusWarmer, Failure
from spolia.cli.options import (
    DEFAULT_ADDRESS,
    Address,
    Json,
    Model,
    Retry,
    SplitMaxTokens,
    SplitterOption,
    Timeout,
    name_of,
)
from spolia.cli.output import exit_code, notes, print_error, print_json
from spolia.cli.texts import files_of
from spolia.cli.units import counted, human_bytes
from spolia.client import Client
from spolia.errors import InvalidRequest

MAX_FAILURES_SHOWN = 20


def warm(
    paths: Annotated[list[Path], typer.Argument(help="Files, or folders of files.", metavar="PATH")],
    pattern: Annotated[str, typer.Option("--glob", help="Which files of a folder.")] = "*",
    splitter: SplitterOption = None,
    split_max_tokens: SplitMaxTokens = None,
    model: Model = "",
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 86400.0,
    retry: Retry = 5.0,
    as_json: Json = False,
) -> None:
    """Compute the KV of documents and store it, so that later prompts reuse it at any position.

    What is stored already is not computed again, so a run that was interrupted goes on where it stopped. Of a folder
    texts are taken: what is none, and what is longer than the model's context, is left out, and named. A file that
    fails is named and the others go on; the exit code is then that of the first failure.
    """
    files = list(files_of(paths, pattern))
    console = notes()
    bar = Progress(
        TextColumn("warming"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[tokens]} tokens"),
        TextColumn("{task.fields[name]}", markup=False),
        console=console,
        disable=not console.is_terminal,
    )
    with (
        Client(address, timeout_s=timeout, retry_s=retry, model=model) as client,
        Client(address, timeout_s=timeout, retry_s=0, model=model) as once,
        bar,
    ):
        task = bar.add_task("warming", total=len(files), name="", tokens=0)

        def on_done(name: str, num_tokens: int) -> None:
            bar.update(task, advance=1, name=name, tokens=bar.tasks[0].fields["tokens"] + num_tokens)

        report = CorpusWarmer(
            client,
            once,
            timeout_s=timeout,
            splitter=name_of(splitter),
            split_max_tokens=split_max_tokens,
            on_done=on_done,
        ).run(files, [path for path in paths if not path.is_dir()], pattern)
    _show(report, as_json=as_json)


def _show(report: CorpusReport, *, as_json: bool) -> None:
    """Says what was done. Raises `Exit` when not all was."""
    if report.empty:
        notes().print(f"left out, because empty: {', '.join(report.empty)}", markup=False)
    for left_out in report.left_out[:MAX_FAILURES_SHOWN]:
        notes().print(f"left out: {_reason(left_out)}", markup=False)
    if len(report.left_out) > MAX_FAILURES_SHOWN:
        notes().print(f"left out: {len(report.left_out) - MAX_FAILURES_SHOWN} more; --json names them all")
    if not (report.warmed or report.failures):
        raise InvalidRequest("every file is empty, or left out", field="documents", limit="≥ 1 character")
    _print_failures(report.failures)
    totals = _totals(report)
    if as_json:
        failures = [
            {"name": each.name, "error": type(each.error).__name__, "message": each.error.message}
            for each in report.failures
        ]
        reasons = [{"name": each.name, "message": each.error.message} for each in report.left_out]
        print_json({"documents": report.warmed, "failures": failures, "left_out": reasons, **totals})
    else:
        notes().print(_summary(totals), markup=False)
    if report.failures:
        raise typer.Exit(exit_code(report.failures[0].error))


def _print_failures(failures: Sequence[Failure]) -> None:
    for failure in failures[:MAX_FAILURES_SHOWN]:
        notes().print(f"not warmed: {failure.name}", markup=False)
        print_error(failure.error)
    if len(failures) > MAX_FAILURES_SHOWN:
        notes().print(f"not warmed: {len(failures) - MAX_FAILURES_SHOWN} more; --json names them all")


def _reason(left_out: Failure) -> str:
    """With the file's name once."""
    message = left_out.error.message
    return message if left_out.name in message else f"{left_out.name}: {message}"


def _summary(totals: dict[str, int | float]) -> str:
    line = (
        f"warm documents: {totals['num_documents']}, {totals['num_already_stored']} of them since before; "
        f"{counted(int(totals['num_tokens']), 'token')}, {human_bytes(totals['size_bytes'])}; "
        f"{totals['num_computed_chunks']} of {counted(int(totals['num_chunks']), 'chunk')} computed; "
        f"{totals['elapsed_s']:.1f} s"
    )
    if totals["num_left_out"]:
        line += f"; left out: {totals['num_left_out']}"
    if totals["num_failed"]:
        line += f"; failed: {totals['num_failed']}"
    if totals["num_untried"]:
        line += f"; given up before {counted(int(totals['num_untried']), 'document')}, run it again to go on"
    return line


def _totals(report: CorpusReport) -> dict[str, int | float]:
    warmed = report.warmed
    return {
        "num_documents": len(warmed),
        "num_already_stored": sum(document.already_stored for document in warmed),
        "num_failed": len(report.failures),
        "num_left_out": len(report.left_out),
        "num_untried": report.num_untried,
        "num_tokens": sum(document.num_tokens for document in warmed),
        "size_bytes": sum(document.size_bytes for document in warmed),
        "num_chunks": sum(document.num_chunks for document in warmed),
        "num_computed_chunks": sum(document.num_computed_chunks for document in warmed),
        "elapsed_s": round(report.elapsed_s, 3),
    }
