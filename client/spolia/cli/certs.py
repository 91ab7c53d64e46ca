"""`spolia certs`: a local authority for the certificates of nodes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from spolia_core.node_name import CERTIFIED_ROLES

certs = typer.Typer(
    name="certs", help="Make certificates for nodes: an authority of your own, for development.", no_args_is_help=True
)

Folder = Annotated[Path, typer.Argument(help="Folder of the certificates; what nodes are given as tls_dir.")]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", help="Name or address by which clients reach a gateway; several times. localhost is in."),
]
Days = Annotated[int, typer.Option(min=1, max=3650, help="Days that the certificates of nodes are good for.")]


@certs.command("init")
def init(folder: Folder, host: Hosts = None, days: Days = 365) -> None:
    """Make an authority and a certificate for every role: gateway, prefill, decode, kvstore, operator.

    Keep ca.key away from nodes: who has it can be any of them. Its own certificate lasts ten times as long as theirs.
    """
    from spolia.local_authority import init_authority  # loads cryptography, which no other command needs

    init_authority(folder, timedelta(days=days), host or ())
    _say(folder, CERTIFIED_ROLES)


@certs.command("renew")
def renew(
    folder: Folder,
    host: Hosts = None,
    days: Days = 365,
    role: Annotated[list[str] | None, typer.Option("--role", help="Only this one; several times.")] = None,
) -> None:
    """Make new keys and certificates under the authority in the folder. Nodes that run take them over by themselves."""
    from spolia.local_authority import renew_certificates

    roles = role or CERTIFIED_ROLES
    renew_certificates(folder, timedelta(days=days), host or (), roles)
    _say(folder, roles)


def _say(folder: Path, roles: Sequence[str]) -> None:
    print(f"{folder}: certificates of {', '.join(roles)}")
