"""`spolia bench start`: how soon a cluster serves, and how much memory its nodes take.

A round starts a cluster as a user does, asks it one question, lets a decode node join, and ends everything. The first
has no table of the device yet, which a decode node measures once; the others find it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from spolia_bench import flags
from spolia_bench.frame import Report, progress
from spolia_bench.start.cluster import cluster_up, joined_s
from spolia_bench.start.memory import resident_mib, weights_mib

QUESTION = "How soon does a cluster serve, and how much memory do its nodes take?"
ROLES = ("gateway", "kvstore", "prefill", "decode")
SETTLE_S = 2.0
TIMES = {"up_ready_s": "ready", "up_first_answer_s": "first answer", "join_s": "a decode node joins"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    args = _parser().parse_args(argv)
    report = Report("start", QUESTION, {"model": str(args.model), "rounds": args.rounds})
    seen: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            progress(f"round {number + 1} of {args.rounds}")
            for name, value in _round(args.model, Path(folder)).items():
                seen.setdefault(name, []).append(value)
    _tell(report, seen, weights_mib(args.model))
    report.print(only_json=args.json, out=args.out)
    return 0


def _round(model: Path, tables_dir: Path) -> dict[str, float]:
    with cluster_up(model, tables_dir) as up:
        figures = {"up_ready_s": up.ready_s, "up_first_answer_s": up.first_answer_s}
        time.sleep(SETTLE_S)
        figures |= {f"{role}_rss_mib": resident_mib(up.node(role)["pid"]) for role in ROLES}
        return figures | {"join_s": joined_s(up, model, tables_dir)}


def _tell(report: Report, seen: dict[str, list[float]], model_mib: float) -> None:
    """Medians of all rounds; of times also the first, which has no table of the device."""
    report.header = ("figure", "median", "first", "highest")
    for name, values in seen.items():
        what = TIMES.get(name) or f"{name.removesuffix('_rss_mib')}, resident"
        unit = "s" if name in TIMES else "MiB"
        shown = [f"{value:.1f} {unit}" for value in (statistics.median(values), values[0], max(values))]
        report.rows.append((what, *shown))
        report.figures[name] = round(statistics.median(values), 2)
        report.figures[f"{name}_first"] = round(values[0], 2)
        report.figures[f"{name}_max"] = round(max(values), 2)
    report.figures["model_mib"] = round(model_mib, 2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spolia bench start", description=QUESTION)
    parser.add_argument("--model", type=Path, default=Path("models/demo"), help="folder of the model")
    parser.add_argument("--rounds", type=int, default=5, help="clusters that are started")
    flags.add_output(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
