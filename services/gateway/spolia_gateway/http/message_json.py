"""Messages of the protos as JSON has them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from google.protobuf.message import Message

from spolia.enum_names import enum_name


def message_json(message: Message, *, without: Collection[str] = ()) -> dict[str, Any]:
    """Every field by its name, zeros too; what is unset and could be set is left out, and so is what is named.

    Enums are names in lower case, bytes are hexadecimal, and numbers stay numbers, where protobuf's own JSON makes
    strings of long ones.
    """
    told = {}
    for field in message.DESCRIPTOR.fields:
        if field.name in without or (field.has_presence and not message.HasField(field.name)):
            continue
        value = getattr(message, field.name)
        told[field.name] = (
            [_plain(item, field.enum_type) for item in value] if field.is_repeated else _plain(value, field.enum_type)
        )
    return told


def _plain(value: Any, enum: Any) -> Any:
    """`enum`: the descriptor of the value's enum, by whichever of protobuf's two implementations; None for others."""
    if isinstance(value, Message):
        return message_json(value)
    if isinstance(value, bytes):
        return value.hex()
    return value if enum is None else enum_name(enum, value)
