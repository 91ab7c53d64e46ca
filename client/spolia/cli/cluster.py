"""`spolia cluster`: who is there, and what goes on."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from spolia.cli.cluster_lines import print_cluster
from spolia.cli.cluster_view import View
from spolia.cli.options import DEFAULT_ADDRESS, Address, Json
from spolia.cli.output import print_json
from spolia.client import Client
from spolia.errors import Busy, DeadlineExceeded, InvalidRequest, Unavailable

MIN_INTERVAL_S = 0.1
MAX_INTERVAL_S = 3600.0


def cluster(
    once: Annotated[bool, typer.Option("--once", help="Print what there is now, and end; so do pipes.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.")] = 1.0,
    address: Address = DEFAULT_ADDRESS,
    timeout: Annotated[float, typer.Option(help="Most seconds to wait for one look.")] = 10.0,
    as_json: Json = False,
) -> None:
    """Show the nodes, how busy they are and what they hold: live in a terminal, until Ctrl-C.

    Pools are shown by the state of their blocks, stores by tier, gateways with the hit rate and latencies of their last
    minute, and requests in flight by how far they have come.
    """
    if not MIN_INTERVAL_S <= interval <= MAX_INTERVAL_S:
        raise InvalidRequest(
            f"interval is {interval} s",
            field="interval",
            limit=f"{MIN_INTERVAL_S:g} … {MAX_INTERVAL_S:g} s",
            actual=str(interval),
        )
    with Client(address, timeout_s=timeout, retry_s=0) as client:
        found = client.cluster()
        if as_json:
            print_json(found)
        elif once or not sys.stdout.isatty():
            print_cluster(found)
        else:
            _watch(client, View(address, found), interval)


def _watch(client: Client, view: View, interval_s: float) -> None:
    """Draws until Ctrl-C. A gateway that is away is waited for."""
    with Live(view, console=Console(), screen=True, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(interval_s)
                try:
                    view.saw(client.cluster())
                except (Unavailable, DeadlineExceeded, Busy) as error:
                    view.missed(error)
                live.refresh()
        except KeyboardInterrupt:
            pass
