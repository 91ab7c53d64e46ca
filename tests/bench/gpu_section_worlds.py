"""Sections that a process of its own runs: one that ends, and those that do not. Imports nothing that takes time."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from typing import Any


def ends() -> Iterator[dict[str, Any]]:
    yield {"heads": "mha", "point": "1x2", "shared_ms": 1.5}
    yield {"heads": "mha", "point": "3x4", "shared_ms": 2.5}


def flex() -> Iterator[dict[str, Any]]:
    yield {"heads": "mha", "point": "3x4", "flex_ms": 9.0}


def raises() -> Iterator[dict[str, Any]]:
    yield {"point": "1x2"}
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")


def dies() -> Iterator[dict[str, Any]]:
    yield {"point": "1x2"}
    time.sleep(0.1)
    os._exit(7)


def hangs() -> Iterator[dict[str, Any]]:
    yield {"point": "1x2"}
    time.sleep(600)


def lacks_a_package() -> Iterator[dict[str, Any]]:
    import not_there  # type: ignore[import-not-found]  # that it is not there is the point

    yield {"found": str(not_there)}


def halved(number: int) -> int:
    """Of even numbers; who gets 7 dies, who gets 9 hangs."""
    if number == 7:
        os._exit(3)
    if number == 9:
        time.sleep(600)
    return number // 2


def starts_another() -> Iterator[dict[str, Any]]:
    """As a library starts a compiler."""
    other = subprocess.Popen(["sleep", "600"])
    yield {"pid": other.pid}
    time.sleep(600)
