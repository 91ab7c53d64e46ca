"""`spolia bench replay`: a trace in, hit rate against the ideal and latencies out."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from spolia.local_cluster import LocalCluster
from spolia_bench import flags
from spolia_bench.frame import Report, Sample, progress
from spolia_bench.models import SHAPES, random_model
from spolia_bench.replay import formats
from spolia_bench.replay.ideal import hit_rate, ideal_hits
from spolia_bench.replay.play import Outcome, play
from spolia_bench.replay.scale import first, scaled
from spolia_bench.replay.trace import Trace
from spolia_core.reuse import PREFIX_CHUNK_TOKENS

QUESTION = "How close does exact prefix reuse come to a cache that forgets nothing?"
# A block of 512 tokens becomes one of 128, a prefix chunk: smaller, and what prompts share falls below a chunk. Agents'
# prompts share tens of thousands of tokens. Arrivals are stretched to what two cores can serve.
TOKEN_FACTOR = {"mooncake": 4, "agentic": 32}
STRETCH = {"mooncake": 40.0, "agentic": 1.0}


def main(argv: Sequence[str] | None = None) -> int:
    """Replays a trace; 1 when a request failed, 2 when the file is no such trace or nothing of it can be served."""
    args = _parser().parse_args(argv)
    args.token_factor = args.token_factor or TOKEN_FACTOR[args.kind]
    args.stretch = STRETCH[args.kind] if args.stretch is None else args.stretch
    model = Path(args.model) if args.model else random_model(SHAPES[args.shape], args.seed)
    try:
        trace = _trace(args)
    except (OSError, formats.BadTrace) as error:
        print(f"spolia bench replay: {args.trace}: {error}", file=sys.stderr)
        return 2
    if not trace.requests:
        print("spolia bench replay: no request fits: raise --token-factor or --max-context-tokens", file=sys.stderr)
        return 2
    progress(f"{len(trace.requests)} requests over {trace.requests[-1].at_s:.0f} s, {trace.num_left_out} left out")
    settings = ["--log-level", "warning", "--kvstore.budget-bytes", str(args.pool_bytes)]
    settings += ["--prefill.pool-bytes", str(args.pool_bytes), "--decode.pool-bytes", str(args.pool_bytes)]
    with LocalCluster(model, settings=settings, engine_threads=os.cpu_count() or 1) as cluster:
        outcome = asyncio.run(play(cluster.address, trace, args.vocab_size, args.timeout_s))
    if not outcome.played:
        print(f"spolia bench replay: every request failed: {outcome.failures}", file=sys.stderr)
        return 1
    _report(args, model, trace, outcome).print(only_json=args.json, out=args.out)
    return 1 if outcome.failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spolia bench replay", description=QUESTION)
    add = parser.add_argument
    add("--trace", type=Path, required=True, help="the file, JSON lines; .gz is unpacked")
    add("--kind", choices=sorted(TOKEN_FACTOR), required=True, help="its format")
    add("--block-tokens", type=int, default=formats.MOONCAKE_BLOCK_TOKENS, help="tokens per hash id of a mooncake file")
    add(
        "--session-gap-s",
        type=float,
        default=30.0,
        help="between the starts of sessions of an agentic file, unstretched",
    )
    add("--requests", type=int, default=60, help="how many of the trace's first requests")
    add("--token-factor", type=int, help="divide token counts by this; default: 4 for mooncake, 32 for agentic")
    add("--stretch", type=float, help="multiply times by this; default: 40 for mooncake, 1 for agentic")
    add("--max-context-tokens", type=int, default=8192, help="leave out what is longer once scaled")
    add("--model", help="Hugging Face-format directory; default: a random-weight model of --shape")
    add("--shape", choices=sorted(SHAPES), default="llama-60m-random", help="shape of the random model")
    add("--vocab-size", type=int, default=256, help="prompts are made of the token ids below this")
    add("--pool-bytes", type=int, default=2 << 30, help="KV memory of each node, and of the store")
    add("--timeout-s", type=float, default=600.0, help="limit of each request")
    add("--seed", type=int, default=0, help="seed of the random model's weights")
    flags.add_output(parser)
    return parser


def _trace(args: argparse.Namespace) -> Trace:
    lines = formats.read_lines(args.trace)
    if args.kind == "mooncake":
        trace = formats.parse_mooncake(lines, args.block_tokens)
    else:
        trace = formats.parse_agentic(lines, args.session_gap_s)
    limits = {"stretch": args.stretch, "max_context_tokens": args.max_context_tokens}
    return scaled(first(trace, args.requests), token_factor=args.token_factor, **limits)


def _report(args: argparse.Namespace, model: Path, trace: Trace, outcome: Outcome) -> Report:
    setup = {
        "model": model.name,
        "seed": args.seed,
        "trace": args.trace.name,
        "kind": args.kind,
        "token_factor": args.token_factor,
        "block_tokens": trace.block_tokens,
        "stretch": args.stretch,
        "num_left_out": trace.num_left_out,
        "pool_bytes": args.pool_bytes,
    }
    ttft = Sample(tuple(each.result.ttft_ms for each in outcome.played))
    queue = Sample(tuple(each.queue_ms for each in outcome.played))
    wait = Sample(tuple(each.wait_ms for each in outcome.played))
    late = Sample(tuple(each.late_ms for each in outcome.played))
    num_prompt = sum(each.result.num_prompt_tokens for each in outcome.played)
    num_reused = sum(each.result.reuse.num_reused_tokens for each in outcome.played)
    ideal = hit_rate(trace, ideal_hits(trace))
    in_chunks = hit_rate(trace, ideal_hits(trace, PREFIX_CHUNK_TOKENS))
    report = Report("replay", QUESTION, setup, header=("what", "value"))
    report.figures = {
        "hit_rate": round(num_reused / num_prompt, 4),
        "ideal_hit_rate": round(ideal, 4),
        "ideal_hit_rate_in_prefix_chunks": round(in_chunks, 4),
        "hit_rate_over_ideal": round(num_reused / num_prompt / ideal, 4) if ideal else None,
        "requests": len(outcome.played),
        "failures": outcome.failures,
        "duration_s": round(outcome.duration_s, 2),
        "requests_per_s": round(len(outcome.played) / outcome.duration_s, 3),
        "prompt_tokens": num_prompt,
    }
    for name, sample in (("ttft", ttft), ("wait", wait), ("queue", queue), ("late", late)):
        report.figures |= {
            f"{name}_p{percent}_ms": round(sample.percentile_ms(percent / 100), 2) for percent in (50, 90, 99)
        }
    report.rows = [(name.replace("_", " "), str(value)) for name, value in report.figures.items()]
    return report


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
