"""What a run of `spolia bench gateway` is told."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spolia_bench import flags

QUICK = {"shape": "llama-tiny-random", "streams": (1, 4), "tokens": 8, "rounds": 2, "answers": 4}
"""Every path once, in seconds: says that it works, not what it costs."""


@dataclass(frozen=True, slots=True)
class Options:
    """See the flags' help."""

    shape: str
    tokenizer: Path
    streams: tuple[int, ...]
    tokens: int
    rounds: int
    answers: int
    threads: int
    seed: int
    quick: bool
    json: bool
    out: Path | None


def parse(argv: Sequence[str] | None) -> Options:
    """Ends the process with a message for what cannot be."""
    return Options(**vars(flags.parse(_parser(), argv, QUICK)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spolia bench gateway",
        description="What do HTTP and gRPC add to the engine's time to first token and time per token?",
    )
    add = parser.add_argument
    add(
        "--shape",
        default="llama-8m-random",
        help="shape of the model, random weights; a small one, whose times vary less",
    )
    add("--tokenizer", type=Path, default=Path("models/demo"), help="folder whose tokenizer and chat template it gets")
    add("--streams", type=flags.numbers, default=(1, 32), help="streams at once, comma-separated")
    add("--tokens", type=int, default=64, help="tokens of an answer")
    add("--rounds", type=int, default=15, help="rounds, each with every way once")
    add(
        "--answers",
        type=int,
        default=4,
        help="answers of each stream in a row in the steady section, where the first and last seldom count; 0 leaves "
        "the section out",
    )
    add("--threads", type=int, default=1, help="threads of the engine, alone and in the cluster alike")
    add("--seed", type=int, default=0, help="of weights and prompts")
    flags.add_quick(parser)
    flags.add_output(parser)
    return parser
