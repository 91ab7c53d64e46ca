"""The gateway process: `python -m spolia_gateway`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from spolia_gateway.config import GatewayConfig
from spolia_gateway.node import GatewayNode
from spolia_node.process import run_process


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit code: 2 when the settings cannot work here."""
    return run_process(GatewayConfig, GatewayNode, argv)


if __name__ == "__main__":
    sys.exit(main())
