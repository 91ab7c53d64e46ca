"""`spolia calibrate`: the cheapest reuse policy that keeps a model's loss under bounds, as a profile."""

from __future__ import annotations

from typing import Annotated

import typer

from spolia.cli.plugins import COMMANDS, find_program


def calibrate(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Its arguments; `spolia calibrate --help` lists them.")
    ] = None,
) -> None:
    """Find the cheapest reuse policy that keeps a model's loss under bounds, and write it as the model's profile.

    Exit code 5 where no measured policy was shown to keep them.
    """
    program = find_program(COMMANDS, "calibrate", "command", "all")
    raise typer.Exit(program(arguments or []) or 0)
