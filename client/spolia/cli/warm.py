"""`spolia warm`: compute documents before anyone asks about them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from spolia.cli.options import DEFAULT_ADDRESS, Address, Json, Model, Timeout
from spolia.cli.output import notes, print_json
from spolia.cli.texts import read_documents
from spolia.cli.units import counted, human_bytes
from spolia.client import Client
from spolia.results import WarmedDocument


def warm(
    paths: Annotated[list[Path], typer.Argument(help="Files, or folders of files.", metavar="PATH")],
    pattern: Annotated[str, typer.Option("--glob", help="Which files of a folder.")] = "*",
    model: Model = "",
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 600.0,
    as_json: Json = False,
) -> None:
    """Compute the KV of documents and store it, so that later prompts reuse it at any position."""
    documents = read_documents(paths, pattern)
    bar = Progress(
        TextColumn("warming"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[name]}", markup=False),
        console=notes(),
    )
    with Client(address, timeout_s=timeout, model=model) as client, bar:
        task = bar.add_task("warming", total=len(documents), name="")
        warmed = client.warm(documents, on_progress=lambda done: bar.update(task, advance=1, name=done.name))
    if as_json:
        print_json({"documents": warmed, **_totals(warmed)})
        return
    totals = _totals(warmed)
    notes().print(
        f"warm documents: {totals['num_documents']}, {totals['num_already_stored']} of them since before; "
        f"{counted(totals['num_tokens'], 'token')}, {human_bytes(totals['size_bytes'])}"
    )


def _totals(warmed: list[WarmedDocument]) -> dict[str, int]:
    return {
        "num_documents": len(warmed),
        "num_already_stored": sum(document.already_stored for document in warmed),
        "num_tokens": sum(document.num_tokens for document in warmed),
        "size_bytes": sum(document.size_bytes for document in warmed),
    }
