"""`spolia eval`: what reuse costs a model in quality, per policy."""

from __future__ import annotations

from typing import Annotated

import typer

from spolia.cli.plugins import COMMANDS, find_program


def evaluate(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Its arguments; `spolia eval --help` lists them.")
    ] = None,
) -> None:
    """Measure what reuse of KV costs a model in quality, per policy, against full recompute."""
    program = find_program(COMMANDS, "eval", "command", "all")
    raise typer.Exit(program(arguments or []) or 0)
