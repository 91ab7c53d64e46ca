"""How many files and connections this process may have open."""

from __future__ import annotations

import resource

WANTED = 65_536
"""More than a node's limits on connections and objects come to. Some systems allow a billion, which programs that look
through all that may be open would suffer from."""


def is_enough(limit: int, wanted: int) -> bool:
    """Whether a limit, as `raise_open_files` gives it, lets a process have so many open."""
    return limit == resource.RLIM_INFINITY or limit >= wanted


def raise_open_files() -> int:
    """Raises the limit to `WANTED`, or as near to it as this system allows; what it is now. Shells leave it at 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    most = WANTED if hard == unlimited else min(hard, WANTED)
    if soft == unlimited:
        return soft
    while soft < most:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            return most
        except ValueError:  # macOS has a bound of its own, below a hard limit that is none
            most //= 2
    return soft
