"""`spolia bench gateway`: options in, rounds run, one report out."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from spolia_bench.gateway.options import parse

QUESTION = "What do HTTP and gRPC add to the engine's time to first token and time per token?"


def main(argv: Sequence[str] | None = None) -> int:
    """Measures every number of streams."""
    options = parse(argv)
    # Read when torch loads; threads that spin are slow beside any other process.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from spolia_bench.frame import Report
    from spolia_bench.gateway.model import chat_model
    from spolia_bench.gateway.rounds import measure
    from spolia_bench.models import SHAPES

    names = ("shape", "streams", "tokens", "rounds", "answers", "threads", "seed", "quick")
    setup: dict[str, object] = {name: getattr(options, name) for name in names}
    report = Report("gateway", QUESTION, setup | {"load_before": round(os.getloadavg()[0], 2)})
    measure(report, chat_model(SHAPES[options.shape], options.tokenizer, options.seed), options)
    report.setup["load_after"] = round(os.getloadavg()[0], 2)
    report.print(only_json=options.json, out=options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
