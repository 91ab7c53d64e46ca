"""`spolia bench`: one benchmark in this process."""

from __future__ import annotations

from typing import Annotated

import typer

from spolia.cli.plugins import find_program

GROUP = "spolia.benches"


def bench(
    name: Annotated[str, typer.Argument(help="Which benchmark.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Its arguments; `spolia bench NAME --help` lists them.")
    ] = None,
) -> None:
    """Run a benchmark; its last line of output is JSON."""
    program = find_program(GROUP, name, "benchmark", "all")
    raise typer.Exit(program(arguments or []) or 0)
