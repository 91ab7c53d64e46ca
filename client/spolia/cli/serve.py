"""`spolia serve`: one service in this process."""

from __future__ import annotations

from typing import Annotated

import typer

from spolia.cli.plugins import find_program

GROUP = "spolia.services"
EXTRA_OF = {"gateway": "gateway", "kvstore": "kvstore", "prefill": "engine", "decode": "engine"}


def serve(
    role: Annotated[str, typer.Argument(help="gateway, prefill, decode or kvstore.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings of the service; `spolia serve ROLE --help` lists them.")
    ] = None,
) -> None:
    """Run one service until it is told to end (SIGTERM, Ctrl-C)."""
    program = find_program(GROUP, role, "service", EXTRA_OF.get(role, "all"))
    raise typer.Exit(program(settings or []) or 0)
