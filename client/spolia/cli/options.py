"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

from spolia.connection import DEFAULT_ADDRESS

Address = Annotated[
    str, typer.Option("--address", "-a", envvar="SPOLIA_ADDRESS", help="Where the gateway is, host:port.")
]
Model = Annotated[str, typer.Option("--model", "-m", help="Model to ask; not needed where the cluster serves one.")]
Timeout = Annotated[float, typer.Option("--timeout", help="Most seconds to wait for the whole command.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else there.")]

__all__ = ["DEFAULT_ADDRESS", "Address", "Json", "Model", "Timeout"]
