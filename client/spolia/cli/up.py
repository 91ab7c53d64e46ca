"""`spolia up`: a whole cluster on this machine."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Annotated

import typer

from spolia.cli.drain_limit import CONFIG_ENV, drain_limit_s
from spolia.cli.options import Json
from spolia.cli.output import notes, print_columns, print_json
from spolia.errors import InvalidRequest
from spolia.local_cluster import LocalCluster
from spolia.local_node import LocalNode, NodeExit, NodeFailed

MODEL_ENV = "SPOLIA_MODEL"
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SIGNAL_DELAY_S = 0.5
"""Longest time a signal may go unnoticed."""

KILL_AFTER_S = 5.0
"""How much later than the longest drain of a node one that still runs is killed."""

SILENCE_S = 1.0
"""An end that takes longer says what it waits for."""


def up(
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="Hugging Face-format folder of the model to serve.")
    ] = None,
    prefill: Annotated[int, typer.Option(min=0, help="How many prefill nodes.")] = 1,
    decode: Annotated[int, typer.Option(min=1, help="How many decode nodes.")] = 1,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port clients connect to; 0 takes a free one.")] = 7300,
    http_port: Annotated[
        int,
        typer.Option(min=-1, max=65535, help="Port of OpenAI-compatible HTTP; 0 takes a free one, -1 turns it off."),
    ] = 8000,
    log_dir: Annotated[Path | None, typer.Option(help="Where the logs go; default: a new temporary folder.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log to the terminal instead.")] = False,
    engine_threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each engine; default: the cores, shared evenly.")
    ] = None,
    profile_dir: Annotated[
        Path | None, typer.Option(help="Folder of calibration profiles; they win over the one in the model's folder.")
    ] = None,
    tls_dir: Annotated[
        Path | None, typer.Option(envvar="SPOLIA_TLS_DIR", help="Certificates, as `spolia certs init` makes them.")
    ] = None,
    keys: Annotated[
        str,
        typer.Option(
            envvar="SPOLIA_KEYS",
            help="API keys, as `spolia keys` makes them; SPOLIA_API_KEY must be an operator's then.",
        ),
    ] = "",
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
    events: SimpleQueue[NodeExit | None] = SimpleQueue()
    drain_s = drain_limit_s(settings or [])
    cluster = LocalCluster(
        model,
        num_prefill=prefill,
        num_decode=decode,
        port=port,
        http_port=http_port,
        settings=settings or [],
        log_dir=log_dir,
        verbose=verbose,
        engine_threads=engine_threads,
        profile_dir=profile_dir,
        tls_dir=tls_dir,
        keys=keys,
        start_timeout_s=start_timeout,
        stop_timeout_s=drain_s + KILL_AFTER_S,
        on_exit=events.put,
    )
    _check_model(model, settings or [])
    try:
        _on_ending_signals(events, interrupt=True)
        with notes().status("starting the cluster"):
            cluster.start()
        _on_ending_signals(events, interrupt=False)
        _announce(cluster, as_json=as_json)
        _watch(cluster, events)
    except KeyboardInterrupt:
        pass
    finally:
        _on_ending_signals(events, interrupt=True)
        _stop(cluster, drain_s)


def _check_model(model: Path | None, settings: Sequence[str]) -> None:
    """Nodes take a model from their own settings too: flags behind --, the environment, a file."""
    flags = {word.partition("=")[0].rpartition(".")[2].lstrip("-") for word in settings if word.startswith("--")}
    if model is None and not flags & {"model", "config"} and not {MODEL_ENV, CONFIG_ENV} & os.environ.keys():
        raise InvalidRequest("name the model to serve: spolia up --model DIR", field="model")


def _on_ending_signals(events: SimpleQueue[NodeExit | None], *, interrupt: bool) -> None:
    """Has a signal put None into `events`; with `interrupt`, also cut short what runs now.

    An exception alone could get lost: Python drops one that is raised while an object is being finalised.
    """

    def ask_to_end(number: int, frame: FrameType | None) -> None:
        events.put(None)
        if interrupt:
            raise KeyboardInterrupt

    for number in ENDING_SIGNALS:
        signal.signal(number, ask_to_end)


def _announce(cluster: LocalCluster, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "address": cluster.address,
                "http_address": cluster.http_address,
                "url": cluster.url,
                "log_dir": cluster.log_dir,
                "nodes": cluster.nodes,
            }
        )
        return
    print_columns(("node", "address", "metrics", "pid", "log"), *map(_cells, cluster.nodes))
    print(
        "\nready. Try, in another terminal:\n\n"
        f"{_exports(cluster)}"
        f'  spolia generate --address {cluster.address} --max-tokens 40 "Once upon a time"\n\n'
        f"{_over_http(cluster)}Ctrl-C ends the cluster.",
        flush=True,
    )


def _exports(cluster: LocalCluster) -> str:
    """What a client of this cluster needs in its environment."""
    lines = ["SPOLIA_API_KEY=sk-spolia-…   # as `spolia keys create` printed it"] if cluster.asks_for_keys else []
    if cluster.ca_file is not None:
        lines.append(f"SPOLIA_CA_FILE={shlex.quote(str(cluster.ca_file.resolve()))}")
    return "".join(f"  export {line}\n" for line in lines)


def _cells(node: LocalNode) -> tuple[str, ...]:
    metrics = f"http://{node.metrics_address}/metrics" if node.metrics_address else "-"
    return node.name, node.address, metrics, str(node.pid), str(node.log_path or "this terminal")


def _over_http(cluster: LocalCluster) -> str:
    """Browsers and OpenAI's clients know nothing of our variables."""
    if not cluster.url:
        return ""
    ca_file = cluster.ca_file
    believes = "" if ca_file is None else f"\n  with SSL_CERT_FILE={shlex.quote(str(ca_file.resolve()))}"
    return f"to look at: {cluster.url}/\nOpenAI's clients: base URL {cluster.url}/v1{believes}\n\n"


def _watch(cluster: LocalCluster, events: SimpleQueue[NodeExit | None]) -> None:
    """Reports each node that ends, until None comes; raises `NodeFailed` once the cluster can serve nobody any more."""
    while (ended := _next_event(events)) is not None:
        left = {node.role for node in cluster.nodes}
        serves = {"gateway", "decode"} <= left
        notes().print(f"{ended}; the cluster {'goes on' if serves else 'ends'}", markup=False)
        notes().print(ended.log_tail, style="dim", markup=False)
        if not serves:
            raise NodeFailed(f"{ended}, and the cluster cannot serve without it")


def _next_event(events: SimpleQueue[NodeExit | None]) -> NodeExit | None:
    # Python runs signal handlers between bytecodes: a signal that comes just before a wait begins is seen only when the
    # wait ends. So no wait is endless.
    while True:
        try:
            return events.get(timeout=SIGNAL_DELAY_S)
        except Empty:
            continue


def _stop(cluster: LocalCluster, drain_s: float) -> None:
    """A second signal ends all nodes at once."""
    telling = threading.Timer(SILENCE_S, _tell_wait, (cluster, drain_s))
    telling.daemon = True
    telling.start()
    try:
        for node in cluster.stop():
            notes().print(f"{node.name} (pid {node.pid}) did not end in time and was killed")
    finally:
        telling.cancel()


def _tell_wait(cluster: LocalCluster, drain_s: float) -> None:
    serves = any(node.role == "gateway" for node in cluster.nodes)
    what = "answers under way" if serves else "nodes to end"
    notes().print(f"waiting for {what}, at most {drain_s:g} s; again to end now")
