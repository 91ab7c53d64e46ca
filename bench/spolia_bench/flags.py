"""The flags that benchmarks have in common."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path


def add_output(parser: argparse.ArgumentParser) -> None:
    """`--json` and `--out`: how a report is told."""
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")


def add_quick(parser: argparse.ArgumentParser) -> None:
    """`--quick`; `parse` says what it stands for."""
    parser.add_argument("--quick", action="store_true", help="every path once on tiny models, in seconds")


def add_sections(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """`--sections`: all of `names` by default."""
    chosen = partial(some_of, names=names)
    parser.add_argument("--sections", type=chosen, default=names, help=f"some of {','.join(names)}; default: all")


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, quick: Mapping[str, object]
) -> argparse.Namespace:
    """What `argv` says. With `--quick`, what it does not say is as in `quick`."""
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**quick)
    return parser.parse_args(argv)


def numbers(text: str) -> tuple[int, ...]:
    """The numbers in a comma-separated list."""
    return tuple(int(number) for number in text.split(","))


def some_of(text: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names in a comma-separated list. Raises `ArgumentTypeError`, saying what there is, for one that is not."""
    named = tuple(name.strip() for name in text.split(","))
    for name in named:
        if name not in names:
            raise argparse.ArgumentTypeError(f'no section "{name}"; there are {", ".join(names)}')
    return named
