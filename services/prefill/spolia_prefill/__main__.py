"""The prefill process: `python -m spolia_prefill`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from spolia_node.process import run_process
from spolia_prefill.config import PrefillConfig
from spolia_prefill.node import PrefillNode
from spolia_worker.loading import load_engine


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit code: 2 when the settings or the model cannot work here."""
    return run_process(PrefillConfig, lambda config: PrefillNode(config, load_engine(config)), argv)


if __name__ == "__main__":
    sys.exit(main())
