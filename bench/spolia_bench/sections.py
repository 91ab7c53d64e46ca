"""The flag that names some sections of a benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def some_of(text: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names in a comma-separated list. Raises `ArgumentTypeError`, saying what there is, for one that is not."""
    named = tuple(name.strip() for name in text.split(","))
    for name in named:
        if name not in names:
            raise argparse.ArgumentTypeError(f'no section "{name}"; there are {", ".join(names)}')
    return named
