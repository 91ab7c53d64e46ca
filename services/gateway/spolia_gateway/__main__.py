"""The gateway process: `python -m spolia_gateway`."""

from __future__ import annotations

import asyncio
import sys

from spolia_core.errors import SpoliaError
from spolia_gateway.config import GatewayConfig
from spolia_gateway.node import GatewayNode
from spolia_node.config import load_config
from spolia_node.logs import configure_logs


def main(argv: list[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit code: 2 when the settings cannot work here."""
    config = load_config(GatewayConfig, sys.argv[1:] if argv is None else argv)
    configure_logs(config.log_level, config.log_json, config.node_id, "gateway")
    try:
        return asyncio.run(_serve(config))
    except SpoliaError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 2


async def _serve(config: GatewayConfig) -> int:
    node = GatewayNode(config)
    try:
        await node.start()
        return await node.server.run_until_signal()
    finally:
        await node.close()


if __name__ == "__main__":
    sys.exit(main())
