"""`spolia up`: a whole cluster on this machine."""

from __future__ import annotations

import signal
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated

import typer
from rich.table import Table

from spolia.cli.options import Json
from spolia.cli.output import console, notes, print_json
from spolia.local_cluster import LocalCluster
from spolia.local_node import NodeExit, NodeFailed

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def up(
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="Hugging Face-format folder of the model to serve.")
    ] = None,
    prefill: Annotated[int, typer.Option(min=0, help="How many prefill nodes.")] = 1,
    decode: Annotated[int, typer.Option(min=1, help="How many decode nodes.")] = 1,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port clients connect to; 0 takes a free one.")] = 7300,
    log_dir: Annotated[Path | None, typer.Option(help="Where the logs go; default: a new temporary folder.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log to the terminal instead.")] = False,
    engine_threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each engine; default: the cores, shared evenly.")
    ] = None,
    start_timeout: Annotated[float, typer.Option(help="Most seconds until the cluster serves.")] = 120.0,
    as_json: Json = False,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="After --: settings of every node (--log-level debug) or of one role (--decode.max-batch-rows 4)."
        ),
    ] = None,
) -> None:
    """Run a whole cluster on this machine: a kvstore, prefill and decode nodes, and a gateway.

    Ends with Ctrl-C or SIGTERM, and when the gateway or the last decode node has died.
    """
    exits: SimpleQueue[NodeExit] = SimpleQueue()
    cluster = LocalCluster(
        model,
        num_prefill=prefill,
        num_decode=decode,
        port=port,
        settings=settings or [],
        log_dir=log_dir,
        verbose=verbose,
        engine_threads=engine_threads,
        start_timeout_s=start_timeout,
        on_exit=exits.put,
    )
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    try:
        with notes().status("starting the cluster"):
            cluster.start()
        _announce(cluster, as_json=as_json)
        _watch(cluster, exits)
    except KeyboardInterrupt:
        pass
    finally:
        _stop(cluster)


def _announce(cluster: LocalCluster, *, as_json: bool) -> None:
    if as_json:
        print_json({"address": cluster.address, "log_dir": cluster.log_dir, "nodes": cluster.nodes})
        return
    table = Table("node", "address", "pid", "log", box=None)
    for node in cluster.nodes:
        table.add_row(node.name, node.address, str(node.pid), str(node.log_path or "here"))
    console().print(table, markup=False)
    print(
        "\nready. Try, in another terminal:\n\n"
        f'  spolia generate --address {cluster.address} --max-tokens 40 "Once upon a time"\n\n'
        "Ctrl-C ends the cluster.",
        flush=True,
    )


def _watch(cluster: LocalCluster, exits: SimpleQueue[NodeExit]) -> None:
    """Reports each node that ends; raises `NodeFailed` once the cluster can serve nobody any more."""
    while True:
        ended = exits.get()
        left = {node.role for node in cluster.nodes}
        serves = {"gateway", "decode"} <= left
        notes().print(f"{ended}; the cluster {'goes on' if serves else 'ends'}", markup=False)
        notes().print(ended.log_tail, style="dim", markup=False)
        if not serves:
            raise NodeFailed(f"{ended}, and the cluster cannot serve without it", field=ended.node.role)


def _stop(cluster: LocalCluster) -> None:
    for node in cluster.stop():
        notes().print(f"{node.name} (pid {node.pid}) did not end in time and was killed")
