"""What `spolia eval` and `spolia calibrate` are asked for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spolia_core.errors import InvalidRequest
from spolia_engine.adapter import DTYPES

DEFAULT_QUESTIONS = 3_000
QUICK_QUESTIONS = 320
QUICK_CONTEXTS = 4
"""Contexts taken from each text and QA file in quick mode."""

SMALL_MODEL_BYTES = 128 << 20
"""Weights on disk below which one thread is the default. Demo model (2.8 MB), two cores busy with other work: two
threads took 1.8 s per context where one took 0.26 s, since each of many small products waits for the slower thread."""


@dataclass(frozen=True, slots=True)
class Options:
    """One run of the harness, checked.

    `passage_tokens` None: passages of QA files stay whole. `max_contexts` is per text or QA file; None takes the
    input's own limit. `threads` None: chosen by the model's size. `generate`: answers to the generated tasks are
    decoded and compared as words, not token by token.
    """

    model: Path
    seed: int = 0
    num_questions: int = DEFAULT_QUESTIONS
    num_chunks: int = 8
    chunk_tokens: int = 128
    passage_tokens: int | None = None
    texts: tuple[Path, ...] = ()
    qa_files: tuple[Path, ...] = ()
    max_contexts: int | None = None
    threads: int | None = None
    dtype: str = "float32"
    generate: bool = False
    quick: bool = False

    def __post_init__(self) -> None:
        _at_least("seed", self.seed, 0)
        _at_least("questions", self.num_questions, 0)
        _at_least("chunks", self.num_chunks, 1)
        _at_least("chunk-tokens", self.chunk_tokens, 1)
        if self.threads is not None:
            _at_least("threads", self.threads, 1)
        if self.max_contexts is not None:
            _at_least("contexts", self.max_contexts, 1)
        if self.passage_tokens is not None:
            _at_least("passage-tokens", self.passage_tokens, 1)
        files = (*self.texts, *self.qa_files)
        for index, path in enumerate(files):
            if not path.is_file():
                raise InvalidRequest(f"there is no file {path}", field="text or qa", actual=str(path))
            if any(path.samefile(other) for other in files[:index]):
                raise InvalidRequest(f"{path} is given twice", field="text or qa", actual=str(path))
        if not (self.num_questions or self.texts or self.qa_files):
            raise InvalidRequest(
                "nothing to measure on: no synthetic questions, no text and no QA file",
                field="questions",
                limit="≥ 1, or a --text or --qa file",
                actual="0",
            )

    @property
    def num_threads(self) -> int:
        """Torch threads to use."""
        if self.threads is not None:
            return self.threads
        size = sum(file.stat().st_size for file in self.model.glob("*.safetensors"))
        return 1 if size < SMALL_MODEL_BYTES else usable_cores()

    def described(self) -> dict[str, Any]:
        """As plain JSON values, for reports."""
        return {
            "questions": self.num_questions,
            "chunks": self.num_chunks,
            "chunk_tokens": self.chunk_tokens,
            "passage_tokens": self.passage_tokens,
            "texts": [path.name for path in self.texts],
            "qa": [path.name for path in self.qa_files],
            "max_contexts": self.max_contexts,
            "generate": self.generate,
            "quick": self.quick,
        }


def add_options(parser: argparse.ArgumentParser, default_questions: int = DEFAULT_QUESTIONS) -> None:
    """The arguments that both commands have."""
    parser.set_defaults(default_questions=default_questions)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face-format directory")
    parser.add_argument(
        "--questions",
        type=int,
        help="questions on generated texts; 0 leaves those out "
        f"(default {default_questions}, {QUICK_QUESTIONS} with --quick)",
    )
    parser.add_argument(
        "--generate",
        action="store_true",
        help="for models not trained on the generated tasks: decode answers and compare words, "
        "rather than asking for every token and the end of sequence",
    )
    parser.add_argument(
        "--chunks",
        type=int,
        default=8,
        help="chunks per context (default 8); QA records that bring their own passages keep them all",
    )
    parser.add_argument(
        "--chunk-tokens", type=int, default=128, help="tokens per chunk of generated and of plain text (default 128)"
    )
    parser.add_argument(
        "--passage-tokens", type=int, help="cut passages of QA files to this many tokens (default: they stay whole)"
    )
    parser.add_argument(
        "--text", type=Path, action="extend", nargs="+", default=[], help="text files to measure on as well"
    )
    parser.add_argument(
        "--qa", type=Path, action="extend", nargs="+", default=[], help="QA files to measure on as well"
    )
    parser.add_argument("--contexts", type=int, help="most contexts taken from each text or QA file")
    parser.add_argument("--quick", action="store_true", help="a minute's run: few questions, wide intervals")
    parser.add_argument("--seed", type=int, default=0, help="fixes texts, draws and intervals (default 0)")
    parser.add_argument(
        "--threads",
        type=int,
        help="torch threads; figures may differ in the last bits between counts "
        "(default: one for small models, which gain little from more and lose much on a busy machine; else every core)",
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="compute in this (default float32)")
    parser.add_argument("--json", action="store_true", help="print one JSON line on standard output and nothing else")
    parser.add_argument("--report", type=Path, help="also write a Markdown report and its plot into this folder")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")


def options_of(args: argparse.Namespace) -> Options:
    """Checks the arguments. Raises `InvalidRequest` naming the first that is wrong."""
    if args.report is not None and args.report.exists() and not args.report.is_dir():
        raise InvalidRequest(f"{args.report} is not a folder", field="report", actual=str(args.report))
    options = Options(
        model=args.model,
        seed=args.seed,
        num_chunks=args.chunks,
        chunk_tokens=args.chunk_tokens,
        passage_tokens=args.passage_tokens,
        texts=tuple(args.text),
        qa_files=tuple(args.qa),
        max_contexts=args.contexts,
        threads=args.threads,
        dtype=args.dtype,
        generate=args.generate,
        quick=args.quick,
        num_questions=args.default_questions if args.questions is None else args.questions,
    )
    if not args.quick:
        return options
    return replace(
        options,
        num_questions=QUICK_QUESTIONS if args.questions is None else args.questions,
        max_contexts=QUICK_CONTEXTS if args.contexts is None else args.contexts,
    )


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InvalidRequest(
            f"--{name} must be ≥ {least}, got {value}", field=name, limit=f"≥ {least}", actual=str(value)
        )


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, Options]:
    """Arguments and options. Wrong usage ends the process as argparse does, with exit code 2."""
    args = parser.parse_args(argv)
    return args, options_of(args)
