"""Results as plain JSON values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from enum import Enum
from typing import Any


def plain(value: object) -> Any:
    """`value` as JSON has it: records as objects; an end of an interval that the data do not hold, and whatever else is
    no finite number, as null; bytes of a file's name that are no characters, as question marks."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Enum():
            return plain(value.value)
        case None | bool() | int():
            return value
        case str():
            return value.encode("utf-8", "replace").decode()
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case _ if dataclasses.is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        case _:
            raise TypeError(f"{type(value).__name__} has no place in a result")
