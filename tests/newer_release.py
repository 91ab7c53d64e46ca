"""Messages as a later release might send them: with fields that this one does not know, at every depth."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import Message

UNKNOWN_FIELDS = (
    b"\x80\xc4\x13\x07"  # field 40000, a number
    b"\x8a\xc4\x13\x05later"  # field 40001, bytes
)
UNKNOWN_NUMBER = 99
"""A value that no enum has."""

M = TypeVar("M", bound=Message)


def newer(message: M) -> M:
    """A copy with unknown fields in it and in every message that it holds."""
    made = type(message)()
    made.CopyFrom(message)
    _add_to(made)
    return made


def has_unknown_fields(message: Message) -> bool:
    """Whether they are in there still."""
    return UNKNOWN_FIELDS in message.SerializeToString()


def _add_to(message: Message) -> None:
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in value if field.is_repeated else [value]:
                _add_to(each)
    message.MergeFromString(UNKNOWN_FIELDS)
