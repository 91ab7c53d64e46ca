"""The kvstore process: `python -m spolia_kvstore`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from spolia_kvstore.config import KVStoreConfig
from spolia_kvstore.node import KVStoreNode
from spolia_node.process import run_process


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit code: 2 when the settings cannot work here."""
    return run_process(KVStoreConfig, KVStoreNode, argv)


if __name__ == "__main__":
    sys.exit(main())
