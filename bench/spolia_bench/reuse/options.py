"""What a run of `spolia bench reuse` is told."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spolia_bench import flags
from spolia_bench.models import SHAPES

SECTIONS = ("ttft", "growth", "loop", "transformers", "demo")
DEMO_MODEL = Path("models/demo")
QUICK = {
    "shape": "llama-tiny-random",
    "documents": 8,
    "document_bytes": 128,
    "rounds": 1,
    "growth_documents": 12,
    "clients": 4,
    "pool_documents": 12,
    "new_tokens": 4,
    "loop_s": 1.0,
    "prefix_loop_s": 1.0,
    "pool_bytes": 64 << 20,
}
"""Every path once, in seconds: says that it works, not how fast it is."""


MIN_DOCUMENTS = 7
"""As many as a round has orders: two that begin alike would share more than documents."""


@dataclass(frozen=True, slots=True)
class Options:
    """See the flags' help."""

    model: str | None
    shape: str
    demo_model: Path
    sections: tuple[str, ...]
    documents: int
    document_bytes: int
    question_bytes: int
    rounds: int
    growth_documents: int
    clients: int
    pool_documents: int
    zipf_exponent: float
    new_tokens: int
    loop_s: float
    prefix_loop_s: float
    pool_bytes: int
    threads: int
    seed: int
    quick: bool
    json: bool
    out: Path | None


def parse(argv: Sequence[str] | None) -> Options:
    """Ends the process with a message for what cannot be."""
    parser = _parser()
    options = Options(**vars(flags.parse(parser, argv, QUICK)))
    if options.documents < MIN_DOCUMENTS:
        parser.error(f"--documents must be at least {MIN_DOCUMENTS}: each order of a round begins with another one")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spolia bench reuse", description="What does reuse save, and how far is it from the hardware's floor?"
    )
    add = parser.add_argument
    add("--model", help="Hugging Face-format directory; default: a random-weight model of --shape")
    add("--shape", choices=sorted(SHAPES), default="llama-60m-random", help="shape of the random model")
    add("--demo-model", type=Path, default=DEMO_MODEL, help="trained model of the demo section, with its profile")
    flags.add_sections(parser, SECTIONS)
    add("--documents", type=int, default=8, help="documents per prompt")
    add("--document-bytes", type=int, default=512, help="length of each; a token each in random models")
    add("--question-bytes", type=int, default=32, help="length of the question")
    add("--rounds", type=int, default=5, help="times each way is asked, with fresh documents each time")
    add("--growth-documents", type=int, default=32, help="documents of the long prompt of the growth section")
    add("--clients", type=int, default=16, help="clients of the closed loop")
    add("--pool-documents", type=int, default=64, help="documents that the loop's requests choose from")
    add("--zipf-exponent", type=float, default=1.0, help="document i is chosen with weight 1 / i ** exponent")
    add("--new-tokens", type=int, default=16, help="answer tokens of each request of the loop")
    add("--loop-s", type=float, default=60.0, help="window of the LINKED loop")
    add("--prefix-loop-s", type=float, default=180.0, help="window of the EXACT loop, whose requests take longer")
    add(
        "--pool-bytes",
        type=int,
        default=4 << 30,
        help="KV memory of each node; the loop's 64 documents take 1.6 GB, the default leaves as much for answers",
    )
    add("--threads", type=int, default=os.cpu_count() or 1, help="torch threads of each node, floor and baseline too")
    add("--seed", type=int, default=0, help="seed of weights, texts, orders and choices")
    flags.add_quick(parser)
    flags.add_output(parser)
    return parser
