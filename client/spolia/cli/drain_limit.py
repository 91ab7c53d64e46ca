"""How long the nodes of a local cluster are given to end, by their own settings."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from spolia.local_cluster import ROLES, settings_for

DRAIN_ENV, CONFIG_ENV = "SPOLIA_DRAIN_TIMEOUT_S", "SPOLIA_CONFIG"
DRAIN_S = 10.0
"""Where nobody says otherwise."""


def drain_limit_s(settings: Sequence[str]) -> float:
    """The longest that any node is given. What is no number, and a file that cannot be read, stop the start of their
    node, which says so.
    """
    limits: list[object] = []
    for role in ROLES:
        flags = settings_for(role, settings)
        limits.append(
            _given(flags, "--drain-timeout-s")
            or os.environ.get(DRAIN_ENV)
            or _in_file(_given(flags, "--config") or os.environ.get(CONFIG_ENV), role)
            or DRAIN_S
        )
    with suppress(ValueError, TypeError):
        return max(float(limit) for limit in limits)  # type: ignore[arg-type]  # what is none is the node's to refuse
    return DRAIN_S


def _given(settings: Sequence[str], flag: str) -> str | None:
    words = [part for word in settings for part in word.split("=", 1)]
    return next((value for name, value in reversed(list(pairwise(words))) if name == flag), None)


def _in_file(path: str | None, role: str) -> object:
    """What the role's table says, else the file for all roles; None where nothing does."""
    if not path:
        return None
    with suppress(OSError, tomllib.TOMLDecodeError):
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        table = content.get(role)
        own = table.get("drain_timeout_s") if isinstance(table, dict) else None
        return content.get("drain_timeout_s") if own is None else own
    return None
