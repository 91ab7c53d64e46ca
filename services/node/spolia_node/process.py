"""A node's process, from its arguments to its exit code."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from spolia_core.errors import SpoliaError
from spolia_node.config import NodeConfig, load_config, role_of
from spolia_node.logs import configure_logs, get_log
from spolia_node.open_files import is_enough, raise_open_files
from spolia_node.server import NodeServer

C = TypeVar("C", bound=NodeConfig)

log = get_log(__name__)


class Node(Protocol):
    """A node as its process sees it."""

    @property
    def server(self) -> NodeServer:
        """What it serves with."""

    async def start(self) -> object:
        """Serves."""

    async def close(self) -> None:
        """Lets go of what is not the server's, which has ended. Also called when `start` raised."""


def run_process(config_class: type[C], make_node: Callable[[C], Node], argv: Sequence[str] | None = None) -> int:
    """Runs a node until it is signalled; its exit code, 2 when it cannot start. `argv` is without the program's name.

    `make_node` is called in the running event loop.
    """
    config = load_config(config_class, sys.argv[1:] if argv is None else argv)
    role = role_of(config_class)
    configure_logs(config.log_level, config.log_json, config.node_id, role)
    _check_open_files(config, raise_open_files())
    try:
        return asyncio.run(_serve(config, make_node))
    except SpoliaError as error:
        print(f"{role}: {error}", file=sys.stderr)
        return 2


def _check_open_files(config: NodeConfig, limit: int) -> None:
    if not is_enough(limit, config.max_client_files):
        log.warning("fewer open files than clients may take", limit=limit, max_client_files=config.max_client_files)


async def _serve(config: C, make_node: Callable[[C], Node]) -> int:
    node = make_node(config)
    # What is loaded by now, torch above all where there is an engine, lives until the end: neither a collection nor the
    # exit has to walk it (an engine's exit took 2 s, it takes 0.2).
    gc.freeze()
    try:
        await node.start()
        return await node.server.run_until_signal()
    finally:
        await node.close()
