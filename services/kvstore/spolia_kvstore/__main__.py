"""The kvstore process: `python -m spolia_kvstore`."""

from __future__ import annotations

import asyncio
import sys

from spolia_core.errors import InvalidRequest
from spolia_kvstore.config import KVStoreConfig
from spolia_kvstore.index import IndexUnusable
from spolia_kvstore.node import KVStoreNode
from spolia_node.config import load_config
from spolia_node.logs import configure_logs


def main(argv: list[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit code: 2 when the settings cannot work here."""
    config = load_config(KVStoreConfig, sys.argv[1:] if argv is None else argv)
    configure_logs(config.log_level, config.log_json, config.node_id, "kvstore")
    try:
        return asyncio.run(_serve(config))
    except (InvalidRequest, IndexUnusable) as error:
        print(f"kvstore: {error}", file=sys.stderr)
        return 2


async def _serve(config: KVStoreConfig) -> int:
    node = KVStoreNode(config)
    try:
        await node.start()
        return await node.server.run_until_signal()
    finally:
        await node.close()


if __name__ == "__main__":
    sys.exit(main())
