"""`spolia bench shared`: options in, sections run, one report out."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from spolia_bench.shared.options import Options, parse

QUESTION = "What does sharing save a decode step, and how far is it from the hardware's floor?"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the chosen sections."""
    options = parse(argv)
    import torch

    from spolia_bench.frame import Report
    from spolia_bench.models import SHAPES
    from spolia_bench.shared import sections
    from spolia_bench.shared.against_transformers import against_transformers
    from spolia_bench.shared.models import random_model
    from spolia_bench.shared.storm import storm_section

    torch.set_num_threads(options.threads)
    report = Report("shared", QUESTION, _setup(options))
    if options.table:
        _tables(report, options)
    else:
        chosen = set(options.sections)
        if chosen - {"gqa", "storm"}:
            # transformers needs the weights as they are, so they are in memory twice: 200 MB more.
            model = random_model(options.model, options.seed)
            world = sections.World(report, options, model, options.model, takes_weights=False)
            if "prefix" in chosen:
                sections.prefix(world, options.prefix_tokens)
            if "permuted" in chosen:
                sections.permuted(world)
            if "grid" in chosen:
                sections.grid(world)
            if "deterministic" in chosen:
                sections.deterministic(world)
            if "transformers" in chosen:
                against_transformers(world, model)
            del world, model
        if "gqa" in chosen:
            sections.prefix(sections.world_of(report, options, options.gqa_model), options.prefix_tokens)
        if "storm" in chosen:
            storm_section(report, options.storm_requests, options.storm_s, SHAPES[options.storm_model], options.seed)
    report.setup["load_after"] = round(os.getloadavg()[0], 2)
    report.print(only_json=options.json, out=options.out)
    return 0


def _tables(report: object, options: Options) -> None:
    from spolia_bench.frame import Report
    from spolia_bench.shared.models import SHAPES
    from spolia_bench.shared.sections import table_of
    from spolia_engine.sharing_table import AttentionShape, measure_sharing

    assert isinstance(report, Report)
    for name in (options.model, options.gqa_model):
        shape = SHAPES[name]
        switch = measure_sharing(AttentionShape(shape.num_q_heads, shape.num_kv_heads, shape.head_dim, "float32"))
        report.tables.append(table_of(switch))
        report.figures[name] = {f"{r}x{t}": [c.shared_us, c.private_us] for (r, t), c in switch.cells.items()}


def _setup(options: Options) -> dict[str, object]:
    names = (
        "model",
        "gqa_model",
        "sections",
        "rows",
        "documents",
        "document_tokens",
        "rounds",
        "grid_rounds",
        "threads",
        "storm_requests",
        "storm_s",
        "storm_model",
    )
    setup: dict[str, object] = {name: getattr(options, name) for name in (*names, "seed", "quick")}
    return setup | {"load_before": round(os.getloadavg()[0], 2)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
