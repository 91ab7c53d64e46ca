"""`spolia eval`: what does each reuse policy lose against full recompute, on the same token ids?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from spolia_fidelity.options import add_options, parsed
from spolia_fidelity.policy import FORMS, parse_policies
from spolia_fidelity.progress import Progress
from spolia_fidelity.report import check_folder, json_line, print_result, speak_any_encoding, write_report
from spolia_fidelity.session import check_model, load, measure

DEFAULT_POLICIES = "full,naive,link:4,link:16,link:32,cacheblend:0.16"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Wrong policies, inputs and report folders are refused before the model is loaded.

    What was found is printed before the report is written: a file that fails does not lose a run.
    """
    args, options = parsed(_parser(), argv)
    policies = parse_policies(args.policies)
    check_model(options.model)
    if args.report is not None:
        check_folder(args.report)
    speak_any_encoding()
    progress = Progress(not (args.json or args.quiet))
    result = measure(load(options, progress), options, policies, progress).result
    if args.json:
        print(json_line(result), flush=True)
    else:
        print_result(result)
    if args.report is not None:
        write_report(result, args.report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spolia eval",
        description="Measure what reuse of KV costs a model in quality, per policy, against full recompute.",
        epilog=f"Policies: {FORMS}. Figures are paired by question; intervals (95 %) resample whole contexts.",
    )
    add_options(parser)
    parser.add_argument(
        "--policies",
        default=DEFAULT_POLICIES,
        help=f"comma-separated; full is always measured (default {DEFAULT_POLICIES})",
    )
    return parser
