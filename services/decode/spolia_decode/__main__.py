"""The decode process: `python -m spolia_decode`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from spolia_decode.config import DecodeConfig
from spolia_decode.node import DecodeNode
from spolia_node.process import run_process
from spolia_worker.loading import load_engine


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit code: 2 when the settings or the model cannot work here."""
    return run_process(DecodeConfig, lambda config: DecodeNode(config, load_engine(config)), argv)


if __name__ == "__main__":
    sys.exit(main())
