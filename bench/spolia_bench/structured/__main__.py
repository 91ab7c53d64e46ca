"""`spolia bench structured`: what a constraint costs a decode step.

Expected: the mask and the choice among what it allows cost a row less than a millisecond, whatever the vocabulary; a
step without a constraint costs what it did. The baseline is the same step without one, in the same rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence

import torch

from spolia_bench import flags
from spolia_bench.frame import Report, progress
from spolia_bench.structured.steps import CONSTRAINTS, Size, Times, compile_ms, engine, measure

QUESTION = "What does a constraint cost a decode step?"
FULL = Size(layers=12, width=512, mlp=2048)
QUICK = Size(layers=2, width=64, mlp=128)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    args = _parser().parse_args(argv)
    setup = {"seed": args.seed, "vocabularies": args.vocabulary, "rows": args.rows, "temperature": args.temperature}
    setup |= {"steps": args.steps, "threads": torch.get_num_threads(), "quick": args.quick}
    report = Report("structured", QUESTION, setup)
    report.header = (
        "vocabulary",
        "rows",
        "constraint",
        "compile ms",
        "mask ms/row",
        "draw ms/row",
        "step ms",
        "÷ none",
    )
    with torch.inference_mode():
        for num_tokens in args.vocabulary:
            with engine(QUICK if args.quick else FULL, num_tokens, args.seed) as core:
                compiled = {name: compile_ms(core, each) if each else 0.0 for name, each in CONSTRAINTS.items()}
                for num_rows in args.rows:
                    progress(f"{num_tokens} tokens, {num_rows} rows")
                    found = measure(core, num_rows, args.steps, args.temperature)
                    for name, times in found.items():
                        _add(report, (num_tokens, num_rows, name), times, found["none"], compiled[name])
    report.print(only_json=args.json, out=args.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spolia bench structured", description=QUESTION)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[3072, 151_935], help="sizes, without the end")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32], help="answers that decode together")
    parser.add_argument("--steps", type=int, default=20, help="steps of each constraint")
    # Random weights leave all tokens about as likely; cold, they choose among as few as trained ones do.
    parser.add_argument("--temperature", type=float, default=0.05, help="0 takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and tokens")
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    flags.add_output(parser)
    return parser


def _add(report: Report, key: tuple[int, int, str], times: Times, none: Times, compiled_ms: float) -> None:
    num_tokens, num_rows, name = key
    ratio = statistics.median(step / free for step, free in zip(times.steps, none.steps, strict=True))
    mask, draw = statistics.median(times.masks), statistics.median(times.draws)
    report.rows.append(
        (
            f"{num_tokens + 1}",
            f"{num_rows}",
            name,
            f"{compiled_ms:.1f}",
            f"{mask:.3f}",
            f"{draw:.3f}",
            f"{times.step_ms:.2f} (n = {len(times.steps)})",
            f"{ratio:.3f}",
        )
    )
    tag = f"{name.replace(',', '').replace(' ', '_')}_{num_tokens + 1}_{num_rows}"
    report.figures |= {f"mask_ms_{tag}": round(mask, 4), f"draw_ms_{tag}": round(draw, 4)}
    report.figures |= {f"step_ms_{tag}": round(times.step_ms, 3), f"step_ratio_{tag}": round(ratio, 4)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
