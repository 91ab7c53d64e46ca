"""How commands speak: results on standard output, everything else on standard error."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from enum import Enum

from rich.console import Console

from spolia.errors import (
    Busy,
    DeadlineExceeded,
    Forbidden,
    InvalidRequest,
    SpoliaError,
    Unauthenticated,
    Unavailable,
)

EXIT_CODES: dict[type[SpoliaError], int] = {
    InvalidRequest: 2,
    Unavailable: 3,
    DeadlineExceeded: 3,
    Busy: 4,
    Unauthenticated: 6,
    Forbidden: 6,
}
OTHER_ERROR = 1


def notes() -> Console:
    """Where progress, summaries and errors go: standard error as it is now."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def exit_code(error: SpoliaError) -> int:
    """What a command that failed with `error` ends with."""
    return next((EXIT_CODES[cls] for cls in type(error).__mro__ if cls in EXIT_CODES), OTHER_ERROR)


def print_error(error: SpoliaError) -> None:
    """Says what went wrong in a line, with what to do about it. The end of a node's log follows, where there is one."""
    facts = [f"{name}: {value}" for name, value in (("field", error.field), ("limit", error.limit)) if value]
    if error.retry_after_ms:
        facts.append(f"try again in {error.retry_after_ms} ms")
    line, *log = error.message.splitlines() or [type(error).__name__]
    print(f"error: {line}" + (f" ({', '.join(facts)})" if facts else ""), *log, sep="\n", file=sys.stderr)


def print_json(value: object) -> None:
    """Prints one JSON object."""
    print(json.dumps(plain(value), ensure_ascii=False))


def print_columns(*rows: Sequence[str]) -> None:
    """Prints rows of equal length with their columns aligned; never cut to the terminal, so that it can be piped."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str) -> None:
    """Prints `rows` under their head, aligned; the one line `empty` where there are none."""
    if rows:
        print_columns(head, *rows)
    else:
        print(empty)


def plain_record(value: object) -> dict[str, object]:
    """A dataclass as JSON has it."""
    report = plain(value)
    assert isinstance(report, dict), value
    return report


def plain(value: object) -> object:
    """`value` as JSON has it: records as objects, members of enums by name in lower case, bytes in hexadecimal."""
    match value:
        case Enum():
            return value.name.lower()
        case bytes():
            return value.hex()
        case Mapping():
            return {str(plain(key)): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case _ if dataclasses.is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        case None | str() | int() | float():
            return value
        case _:
            return str(value)
