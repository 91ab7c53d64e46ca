"""Arguments of the wrong type or size, refused by the name of their field."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real

from spolia_core.errors import InvalidRequest

MAX_REQUEST_ID_BYTES = 128
MAX_UINT32 = 2**32 - 1
MAX_TIMEOUT_S = 10 * 365 * 86400.0
"""Ten years. gRPC turns limits beyond some 292 years into one that has passed already."""


def wrong_type(value: object, field: str, wanted: str) -> InvalidRequest:
    """The error for a value of a type that `field` does not take."""
    given = type(value).__name__
    return InvalidRequest(f"{field} must be {wanted}, got {given}", field=field, limit=wanted, actual=given)


def checked_text(value: object, field: str) -> str:
    """`value`, a str. A lone surrogate is not Unicode and has no UTF-8."""
    if not isinstance(value, str):
        raise wrong_type(value, field, "str")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        actual = f"U+{ord(value[error.start]):04X} at character {error.start}"
        raise InvalidRequest(
            f"{field} must be valid Unicode, got {actual}", field=field, limit="no lone surrogates", actual=actual
        ) from None
    return value


def checked_int(value: object, field: str) -> int:
    """`value`, an int or what counts as one (of numpy, say). A bool does not."""
    if isinstance(value, bool):
        raise wrong_type(value, field, "int")
    try:
        return operator.index(value)  # type: ignore[arg-type]  # TypeError says what has no index
    except TypeError:
        raise wrong_type(value, field, "int") from None


def checked_float(value: object, field: str) -> float:
    """`value`, a real number, as a float. A bool is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise wrong_type(value, field, "float")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def checked_bool(value: object, field: str) -> bool:
    """`value`, a bool."""
    if not isinstance(value, bool):
        raise wrong_type(value, field, "bool")
    return value


def checked_uint32(value: object, field: str) -> int:
    """`value`, an int that fits its field of the message."""
    number = checked_int(value, field)
    if not 0 <= number <= MAX_UINT32:
        limit = f"0 … {MAX_UINT32}"
        raise InvalidRequest(f"{field} must be {limit}, got {number}", field=field, limit=limit, actual=str(number))
    return number


def checked_items(value: object, field: str, wanted: str) -> Iterable[object]:
    """`value`, something to go through. Neither bytes, whose items are numbers, nor a mapping, whose items are keys."""
    if isinstance(value, str | bytes | bytearray | Mapping) or not isinstance(value, Iterable):
        raise wrong_type(value, field, wanted)
    return value


def checked_timeout(value: object) -> float:
    """`value`, seconds that a call may take."""
    seconds = checked_float(value, "timeout_s")
    if not 0 < seconds <= MAX_TIMEOUT_S:
        limit = f"> 0 and ≤ {MAX_TIMEOUT_S:.0f} seconds"
        raise InvalidRequest(
            f"timeout_s must be {limit}, got {seconds}", field="timeout_s", limit=limit, actual=str(seconds)
        )
    return seconds


def checked_retry(value: object) -> float:
    """`value`, seconds for which a call is made again; 0 is none."""
    seconds = checked_float(value, "retry_s")
    if not 0 <= seconds <= MAX_TIMEOUT_S:
        limit = f"≥ 0 and ≤ {MAX_TIMEOUT_S:.0f} seconds"
        raise InvalidRequest(
            f"retry_s must be {limit}, got {seconds}", field="retry_s", limit=limit, actual=str(seconds)
        )
    return seconds


def checked_request_id(value: object) -> str:
    """`value`, a request's name; may be empty."""
    limit = f"≤ {MAX_REQUEST_ID_BYTES} bytes of printable ASCII"
    if not isinstance(value, str):
        raise wrong_type(value, "request_id", f"str, {limit}")
    if len(value) > MAX_REQUEST_ID_BYTES or not (value.isascii() and value.isprintable()):
        actual = repr(value[:200])
        raise InvalidRequest(
            f"request_id must be {limit}, got {actual}", field="request_id", limit=limit, actual=actual
        )
    return value


def check_not_empty(value: Sequence[object], field: str, unit: str) -> None:
    """Raises `InvalidRequest` for nothing at all."""
    if not value:
        raise InvalidRequest(f"{field} is empty", field=field, limit=f"≥ 1 {unit}", actual="0")
