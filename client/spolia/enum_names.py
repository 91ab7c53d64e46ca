"""Members of protobuf enums as people write them."""

from __future__ import annotations

import re

from google.protobuf.descriptor import EnumDescriptor


def enum_name(enum: EnumDescriptor, number: int) -> str:
    """The member in lower case, without the enum's name before it; `unknown_N` for one that a newer node may know."""
    member = enum.values_by_number.get(number)
    prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", enum.name).upper() + "_"
    return f"unknown_{number}" if member is None else member.name.removeprefix(prefix).lower()
