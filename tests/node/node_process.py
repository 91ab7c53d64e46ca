"""A node as a process of its own, for tests of signals. Takes a drain hook's name and the settings' flags."""

from __future__ import annotations

import asyncio
import sys

from node_worlds import with_store

from spolia_node.config import NodeConfig, load_config
from spolia_node.logs import configure_logs
from spolia_node.server import NodeServer


async def well() -> None:
    """Ends at once."""


async def never() -> None:
    """Says that it began, and does not end."""
    print("HOOK", flush=True)
    await asyncio.Event().wait()


async def broken() -> None:
    """Fails."""
    raise RuntimeError("the disk is full")


async def main() -> int:
    config = load_config(NodeConfig, sys.argv[2:])
    configure_logs(config.log_level, config.log_json, config.node_id, "kvstore")
    server = with_store(NodeServer(config, "kvstore"))
    server.on_drain.append({"well": well, "never": never, "broken": broken}[sys.argv[1]])
    await server.start()
    return await server.run_until_signal()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
