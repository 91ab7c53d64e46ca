"""Programs found by entry point and imported only when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import cast

from spolia.errors import InvalidRequest

Program = Callable[[list[str]], int | None]
COMMANDS = "spolia.commands"
"""Entry points of whole commands that need more than the SDK."""


def find_program(group: str, name: str, noun: str, extra: str) -> Program:
    """The `main(argv) -> exit code` that is called `name` in `group`.

    Raises `InvalidRequest` when there is none, with those there are, and when what it needs is not installed.
    """
    found = {point.name: point for point in entry_points(group=group)}
    if name not in found:
        known = ", ".join(sorted(found)) or "none"
        raise InvalidRequest(f"there is no {noun} {name!r}", field=noun, limit=f"installed: {known}", actual=name)
    try:
        return cast(Program, found[name].load())
    except ModuleNotFoundError as error:
        raise InvalidRequest(
            f"{noun} {name} needs {error.name}, which is not installed; try: pip install 'spolia[{extra}]'",
            field=noun,
            actual=name,
        ) from error
