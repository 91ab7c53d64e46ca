"""What this process has open."""

from __future__ import annotations

import os


def open_files() -> list[str]:
    """Names of files and of other things that are open. Other threads may open and close theirs meanwhile."""
    return [name for number in os.listdir("/proc/self/fd") if (name := _name_of(number))]


def _name_of(number: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:  # it was open a moment ago
        return ""
