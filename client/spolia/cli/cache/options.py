"""Options that several commands on stores have."""

from __future__ import annotations

from typing import Annotated

import typer

from spolia.cli.options import DEFAULT_ADDRESS, Address, Json

Stores = Annotated[
    list[str] | None,
    typer.Option(
        "--store",
        "-s",
        envvar="SPOLIA_STORE",
        metavar="HOST:PORT",
        help="A store; may be given several times. Default: all that the gateway at --address knows. The variable "
        "takes several with spaces between.",
    ),
]
Tenant = Annotated[str, typer.Option("--tenant", help="Only this tenant's objects; default: all tenants'.")]
Ids = Annotated[list[str], typer.Argument(metavar="ID", help="First hex digits of chunk ids, 4 or more.")]
# Not the whole command: a person may be asked in between.
Timeout = Annotated[float, typer.Option("--timeout", help="Most seconds to wait for the stores, at each step.")]

__all__ = ["DEFAULT_ADDRESS", "Address", "Ids", "Json", "Stores", "Tenant", "Timeout"]
