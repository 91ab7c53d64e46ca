"""What nodes log."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import structlog
from structlog.testing import capture_logs


@contextmanager
def captured_logs() -> Iterator[list[MutableMapping[str, Any]]]:
    """Log lines of all levels, whatever logging was set to before; that is put back."""
    before = structlog.get_config()
    structlog.reset_defaults()
    try:
        with capture_logs() as lines:
            yield lines
    finally:
        structlog.configure(**before)


def one(lines: Sequence[MutableMapping[str, Any]], event: str) -> MutableMapping[str, Any]:
    """The only line of an event."""
    [line] = [line for line in lines if line["event"] == event]
    return line
