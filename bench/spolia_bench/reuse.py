"""`spolia bench reuse`: what does reuse save in time to first token?

One prompt of several documents and a question, asked four ways of the same cluster, in turn:

    full          EXACT, documents never seen: everything is computed
    prefix        EXACT, the same prompt again: the exact prefix is there
    linked, cold  LINKED, nothing compiled yet: documents are compiled one by one, then linked
    linked        LINKED, the documents in another order: their KV is on the linking node

Ceiling: a linked request computes the question and k tokens per document; with attention over the whole context.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Sequence
from pathlib import Path

from spolia import Client, Document, Result, ReuseMode, TokenSource
from spolia.local_cluster import LocalCluster
from spolia_bench.frame import Report, Sample, progress
from spolia_bench.models import SHAPES, random_model
from spolia_bench.texts import text_of

KINDS = ("full", "prefix", "linked_cold", "linked")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 0 when every request did what its row says."""
    args = _parser().parse_args(argv)
    model = Path(args.model) if args.model else random_model(SHAPES[args.shape], args.seed)
    progress(f"model {model}; starting a cluster")
    # One request at a time: whichever node works may have every core.
    cluster = LocalCluster(model, settings=["--log-level", "warning"], engine_threads=os.cpu_count() or 1)
    with cluster, Client(cluster.address, timeout_s=600.0) as client:
        results = _measure(client, args)
    _report(args, model, results).print(only_json=args.json, out=args.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spolia bench reuse", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", help="Hugging Face-format directory; default: a random-weight model of --shape")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-60m-random", help="shape of the random model")
    parser.add_argument("--documents", type=int, default=8, help="documents per prompt")
    parser.add_argument("--document-bytes", type=int, default=512, help="length of each; a token each in random models")
    parser.add_argument("--question-bytes", type=int, default=32, help="length of the question")
    parser.add_argument(
        "--repeats", type=int, default=5, help="times each way is asked, with fresh documents each time"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, texts and orders")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    return parser


def _measure(client: Client, args: argparse.Namespace) -> dict[str, list[Result]]:
    rng = random.Random(args.seed)
    results: dict[str, list[Result]] = {kind: [] for kind in KINDS}
    for repeat in range(args.repeats + 1):
        documents = [Document(text_of(args.document_bytes, rng)) for _ in range(args.documents)]
        question = text_of(args.question_bytes, rng)
        shuffled = rng.sample(documents, len(documents))
        for kind, order, mode in (
            ("full", documents, ReuseMode.EXACT),
            ("prefix", documents, ReuseMode.EXACT),
            ("linked_cold", documents, ReuseMode.LINKED),
            ("linked", shuffled, ReuseMode.LINKED),
        ):
            result = client.generate([*order, question], mode=mode, max_tokens=2, ignore_eos=True, seed=args.seed)
            _check(kind, result)
            if repeat:  # the first round warms up
                results[kind].append(result)
        progress(f"round {repeat} of {args.repeats}")
    return results


def _check(kind: str, result: Result) -> None:
    """A row must be what it says: a benchmark of another path than the one it names is worse than none."""
    sources = result.reuse.sources
    reused = sources.get(TokenSource.DEVICE, 0)
    total = result.num_prompt_tokens
    expected = {
        "full": sources.get(TokenSource.COMPUTED, 0) == total,
        "prefix": reused >= total - 256,
        "linked_cold": sources.get(TokenSource.COMPILED, 0) > 0.9 * (total - 256),
        "linked": reused > 0 and sources.get(TokenSource.COMPILED, 0) == 0,
    }
    if not expected[kind]:
        raise RuntimeError(f"the {kind} request took another path: {dict(sources)} of {total} prompt tokens")


def _report(args: argparse.Namespace, model: Path, results: dict[str, list[Result]]) -> Report:
    ttft = {kind: Sample(tuple(r.ttft_ms for r in results[kind])) for kind in KINDS}
    full = ttft["full"].median_ms
    last = {kind: results[kind][-1] for kind in KINDS}
    report = Report(
        "reuse",
        "What does reuse save in time to first token?",
        {
            "model": model.name,
            "seed": args.seed,
            "documents": args.documents,
            "document_bytes": args.document_bytes,
            "num_prompt_tokens": last["full"].num_prompt_tokens,
            "repeats": args.repeats,
            "kv_source": "device",
        },
        header=("way", "TTFT ms: median (min … max)", "computed", "link", "reused", "full ÷ this"),
    )
    for kind in KINDS:
        sources = last[kind].reuse.sources
        computed = sources.get(TokenSource.COMPUTED, 0) + sources.get(TokenSource.COMPILED, 0)
        report.rows.append(
            (
                kind.replace("_", ", "),
                str(ttft[kind]),
                str(computed),
                str(last[kind].reuse.num_link_tokens),
                str(last[kind].reuse.num_reused_tokens),
                f"{full / ttft[kind].median_ms:.1f}",
            )
        )
        report.figures[f"ttft_{kind}_ms"] = round(ttft[kind].median_ms, 2)
    report.figures["ratio_full_over_prefix"] = round(full / ttft["prefix"].median_ms, 2)
    report.figures["ratio_full_over_linked"] = round(full / ttft["linked"].median_ms, 2)
    return report
