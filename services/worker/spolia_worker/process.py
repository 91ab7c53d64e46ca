"""The process of a node with an engine, from its arguments to its exit code."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from spolia_core.errors import SpoliaError
from spolia_engine.engine import Engine
from spolia_node.config import load_config, role_of
from spolia_node.logs import configure_logs
from spolia_node.server import NodeServer
from spolia_worker.config import WorkerConfig
from spolia_worker.loading import load_engine

C = TypeVar("C", bound=WorkerConfig)


class Node(Protocol):
    """A node as its process sees it."""

    server: NodeServer

    async def start(self) -> None:
        """Serves."""

    async def close(self) -> None:
        """Lets go of what is not the server's, which has ended."""


def run_process(
    config_class: type[C], make_node: Callable[[C, Engine], Node], argv: Sequence[str] | None = None
) -> int:
    """Runs a node until it is signalled; its exit code, 2 when it cannot start. `argv` is without the program's name.

    `make_node` is called in the running event loop.
    """
    config = load_config(config_class, sys.argv[1:] if argv is None else argv)
    role = role_of(config_class)
    configure_logs(config.log_level, config.log_json, config.node_id, role)
    try:
        return asyncio.run(_serve(config, make_node))
    except SpoliaError as error:
        print(f"{role}: {error}", file=sys.stderr)
        return 2


async def _serve(config: C, make_node: Callable[[C, Engine], Node]) -> int:
    node = make_node(config, load_engine(config))
    # What is loaded by now, torch above all, lives until the end: neither a collection nor the exit has to walk it
    # (the exit took 2 s, it takes 0.2).
    gc.freeze()
    try:
        await node.start()
        return await node.server.run_until_signal()
    finally:
        await node.close()
