"""`spolia bench reuse`: options in, sections run, one report out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from spolia_bench.reuse.options import parse

QUESTION = "What does reuse save in time to first token, and how far is it from the hardware's floor?"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the chosen sections; 0 when every request did what its row says."""
    options = parse(argv)
    # Read when torch loads. Nodes of a local cluster have it too: threads that spin are slow beside any other process.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from spolia_bench.frame import Report, progress
    from spolia_bench.models import SHAPES, random_model
    from spolia_bench.reuse import demo, loop, ttft

    model = Path(options.model) if options.model else random_model(SHAPES[options.shape], options.seed)
    setup = {
        "model": model.name,
        "seed": options.seed,
        "sections": list(options.sections),
        "documents": options.documents,
        "document_bytes": options.document_bytes,
        "question_bytes": options.question_bytes,
        "rounds": options.rounds,
        "threads": options.threads,
        "clients": options.clients,
        "pool_documents": options.pool_documents,
        "zipf_exponent": options.zipf_exponent,
        "new_tokens": options.new_tokens,
        "pool_bytes": options.pool_bytes,
        "quick": options.quick,
        "load_before": round(os.getloadavg()[0], 2),
    }
    report = Report("reuse", QUESTION, setup)
    progress(f"model {model}")
    sections: list[tuple[set[str], Callable[[], None]]] = [
        ({"ttft", "growth", "transformers"}, lambda: ttft.measure(report, model, options)),
        ({"demo"}, lambda: demo.measure(report, options)),
        ({"loop"}, lambda: loop.measure(report, model, options)),
    ]
    for names, measure in sections:
        if names & set(options.sections):
            measure()
            progress(f"so far: {json.dumps(report.figures)}")  # a later section may fail, after minutes
    report.setup["load_after"] = round(os.getloadavg()[0], 2)
    report.print(only_json=options.json, out=options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
