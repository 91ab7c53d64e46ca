"""Fields of a value that was read from somewhere, refused by name."""

from __future__ import annotations

import math

from spolia_core.errors import InvalidRequest


def is_finite(value: object) -> bool:
    """Whether `value` is a number that has a place on the line; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


def check_field(ok: bool, name: str, limit: str, actual: object) -> None:
    """Raises `wrong_field` unless `ok`."""
    if not ok:
        raise wrong_field(name, limit, actual)


def wrong_field(name: str, limit: str, actual: object) -> InvalidRequest:
    """The error for a field that is not what it must be (`limit`); shows at most 200 characters of what it is."""
    shown = actual if isinstance(actual, str) else repr(actual)
    return InvalidRequest(f"{name} must be {limit}, got {shown[:200]}", field=name, limit=limit, actual=shown[:200])
