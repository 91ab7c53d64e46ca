"""What a run of `spolia bench shared` is told."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spolia_bench import flags

SECTIONS = ("prefix", "gqa", "permuted", "grid", "deterministic", "transformers", "storm")
QUICK = {
    "model": "llama-tiny",
    "gqa_model": "qwen-tiny",
    "rows": 4,
    "prefix_tokens": (256, 1024),
    "documents": 3,
    "document_tokens": 64,
    "grid_rows": (1, 4),
    "grid_tokens": (0, 64),
    "baseline_tokens": 128,
    "rounds": 3,
    "grid_rounds": 3,
    "pool_bytes": 256 << 20,
    "storm_requests": 40,
    "storm_s": 2.0,
    "storm_model": "llama-tiny-random",
}
"""Every path once, in seconds: says that it works, not how fast it is."""


@dataclass(frozen=True, slots=True)
class Options:
    """See the flags' help."""

    model: str
    gqa_model: str
    sections: tuple[str, ...]
    rows: int
    prefix_tokens: tuple[int, ...]
    documents: int
    document_tokens: int
    grid_rows: tuple[int, ...]
    grid_tokens: tuple[int, ...]
    baseline_tokens: int
    rounds: int
    grid_rounds: int
    pool_bytes: int
    storm_requests: int
    storm_s: float
    storm_model: str
    threads: int
    seed: int
    table: bool
    quick: bool
    json: bool
    out: Path | None

    def tag_of(self, model: str) -> str:
        """What a figure of the second model has in its name."""
        return "_gqa7" if model == self.gqa_model else ""


def parse(argv: Sequence[str] | None) -> Options:
    """Ends the process with a message for what cannot be."""
    return Options(**vars(flags.parse(_parser(), argv, QUICK)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spolia bench shared",
        description="What does sharing save a decode step, and how far is it from the floor?",
    )
    add = parser.add_argument
    add("--model", default="llama-60m", help="shape without GQA, random weights")
    add("--gqa-model", default="qwen2.5-0.5b", help="shape with GQA, random weights")
    flags.add_sections(parser, SECTIONS)
    add("--rows", type=int, default=32, help="sequences that decode together")
    add(
        "--prefix-tokens",
        type=flags.numbers,
        default=(4096, 16384),
        help="tokens of the common prefix, comma-separated",
    )
    add("--documents", type=int, default=8, help="documents of the permuted rows")
    add("--document-tokens", type=int, default=512, help="length of each")
    add("--grid-rows", type=flags.numbers, default=(1, 2, 4, 8, 16, 32), help="rows of the grid")
    add("--grid-tokens", type=flags.numbers, default=(0, 64, 128, 256, 512, 1024), help="shared tokens of the grid")
    add("--baseline-tokens", type=int, default=2048, help="tokens of the prefix against transformers")
    add("--rounds", type=int, default=15, help="paired rounds of each comparison")
    add("--grid-rounds", type=int, default=21, help="paired rounds of each cell of the grid")
    add("--pool-bytes", type=int, default=8 << 30, help="KV memory")
    add("--storm-requests", type=int, default=2000, help="requests of the storm")
    add("--storm-s", type=float, default=20.0, help="seconds over which they come")
    add("--storm-model", default="llama-60m-random", help="shape of the storm's model, random weights")
    add("--threads", type=int, default=os.cpu_count() or 1, help="torch threads")
    add("--seed", type=int, default=0, help="seed of the weights")
    add("--table", action="store_true", help="only measure and print the switch, for both models' heads")
    flags.add_quick(parser)
    flags.add_output(parser)
    return parser
