"""`spolia bench store`: three questions of the KV store.

lookup     how long finding 32 ids takes in an index of 1 k, 100 k and 1 M entries, SQLite and Redis
transfer   how fast objects of 1 MB and 16 MB are put and got per tier, beside a file copy and redis-py
--chaos    what is lost, damaged, leaked or stuck while stores and Redis are killed at random
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from spolia_bench import flags
from spolia_bench.frame import Report
from spolia_bench.redis_server import NoRedis
from spolia_bench.store import chaos, lookup, transfer

QUESTION = "What does finding and moving chunk objects cost?"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 when a chaos run lost, damaged, leaked or stuck anything, 2 without a Redis for it."""
    args = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="spolia-bench-", dir=args.folder) as folder:
        if args.chaos:
            return _chaos(args, Path(folder))
        return _measure(args, Path(folder))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spolia bench store", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--entries", type=int, nargs="+", default=[1_000, 100_000, 1_000_000], help="sizes of the index"
    )
    parser.add_argument("--runs", type=int, default=5, help="runs of which the median is taken")
    parser.add_argument("--only", choices=["lookup", "transfer"], help="one of the two questions")
    parser.add_argument("--chaos", action="store_true", help="kill stores and Redis at random instead")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the chaos")
    parser.add_argument("--clients", type=int, default=64, help="readers and writers at once in the chaos")
    parser.add_argument("--seed", type=int, default=0, help="seed of ids, bytes and kills")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's folder for temporary files")
    flags.add_output(parser)
    return parser


def _measure(args: argparse.Namespace, folder: Path) -> int:
    setup = {"seed": args.seed, "runs": args.runs}
    if args.only != "transfer":
        setup["entries"] = args.entries
    report = Report("store", QUESTION, setup)
    report.header = ("what", "unit", "median of runs (min … max)")
    if args.only != "transfer":
        lookup.measure(report, folder / "lookup", args.entries, args.runs, args.seed)
    if args.only != "lookup":
        asyncio.run(transfer.measure(report, folder / "transfer", args.runs, args.seed))
    report.print(only_json=args.json, out=args.out)
    return 0


def _chaos(args: argparse.Namespace, folder: Path) -> int:
    try:
        outcome = asyncio.run(chaos.run(folder, args.seconds, args.clients, args.seed))
    except NoRedis as error:
        print(f"spolia bench store --chaos: {error}", file=sys.stderr)
        return 2
    outcome.report(args.seed).print(only_json=args.json, out=args.out)
    return 0 if outcome.is_clean else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
