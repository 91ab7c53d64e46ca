"""Sizes and times as people read and write them."""

from __future__ import annotations

import re

from spolia.errors import InvalidRequest

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>[smhd])")
SECONDS_OF = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
DURATION_LIMIT = "a number and s, m, h or d, like 30s, 10m or 1h"


def human_bytes(num_bytes: float) -> str:
    """Three digits or so, with a unit: 512 B, 1.5 MiB."""
    if num_bytes < 1024:
        return f"{num_bytes:.0f} B"
    power = next((power for power in (1, 2, 3) if num_bytes / 1024**power < 999.5), 4)
    number = num_bytes / 1024**power
    return f"{number:.1f} {UNITS[power]}" if number < 99.95 else f"{number:.0f} {UNITS[power]}"


def counted(number: int, singular: str, plural: str = "") -> str:
    """A number and what it counts: 1 object, 2 objects. `plural` where it is not the singular and an s."""
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def human_seconds(seconds: float) -> str:
    """The largest whole unit: 42s, 12m, 3h, 5d."""
    unit = next((unit for unit in ("d", "h", "m") if seconds >= SECONDS_OF[unit]), "s")
    return f"{int(seconds / SECONDS_OF[unit])}{unit}"


def human_ms(milliseconds: float) -> str:
    """Three digits or so, with a unit: 0.42 ms, 38 ms, 2.1 s, 12m."""
    if milliseconds < 9.95:
        return f"{milliseconds:.2g} ms"
    if milliseconds < 999.5:
        return f"{milliseconds:.0f} ms"
    return f"{milliseconds / 1000:.1f} s" if milliseconds < 99_950 else human_seconds(milliseconds / 1000)


def percent(share: float) -> str:
    """A share of one: 77 %."""
    return f"{100 * share:.0f} %"


def parse_duration(text: str, field: str) -> float:
    """Seconds. Raises `InvalidRequest`, naming `field`, for anything that is not one number and its unit."""
    found = DURATION.fullmatch(text.strip())
    if found is None:
        raise InvalidRequest(f"{field} is no duration: {text!r}", field=field, limit=DURATION_LIMIT, actual=text)
    return float(found["number"]) * SECONDS_OF[found["unit"]]
