"""Protobuf messages as no careful client would send them, drawn by Hypothesis.

Of three kinds: built field by field from the descriptor alone; a good one with a few fields replaced; and the bytes of
either, damaged. Values are those at which code goes wrong: edges of integers, enum values of no release, numbers that
are none, ids that exist, ids that cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

KNOWN_STRINGS: list[str] = ["", "user", "tenant", "default", "shared", "raw", "request", "\0", "é\n", "x" * 300, "../x"]
KNOWN_BYTES: list[bytes] = [b"", b"short", bytes(32), b"\xff" * 32, bytes(33)]
MAX_DEPTH = 4

_UNSIGNED = [0, 1, 2, 3, 15, 16, 17, 127, 128, 1535, 1536, 2**31 - 1, 2**31, 2**32 - 1]
_WIDE = [*_UNSIGNED, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
_FLOATS = [0.0, -0.0, -1.0, 0.5, 1.0, 1e-45, 1e38, math.inf, -math.inf, math.nan]
_ENUMS = [0, 1, 2, 3, 4, 9, 1000, 2**31 - 1, -1, -(2**31)]


def scalar(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    """Values of one field that is no message."""
    kinds: dict[int, st.SearchStrategy[Any]] = {
        FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
        FieldDescriptor.CPPTYPE_UINT32: st.sampled_from(_UNSIGNED) | st.integers(0, 64),
        FieldDescriptor.CPPTYPE_UINT64: st.sampled_from(_WIDE) | st.integers(0, 64),
        FieldDescriptor.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1),
        FieldDescriptor.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1),
        FieldDescriptor.CPPTYPE_FLOAT: st.sampled_from(_FLOATS),
        FieldDescriptor.CPPTYPE_DOUBLE: st.sampled_from([*_FLOATS, 1e308, 5e-324]),
        FieldDescriptor.CPPTYPE_ENUM: st.sampled_from(_ENUMS),
    }
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.sampled_from(KNOWN_BYTES) | st.binary(max_size=40)
    if field.type == FieldDescriptor.TYPE_STRING:
        return st.sampled_from(KNOWN_STRINGS) | st.text(max_size=20)
    return kinds[field.cpp_type]


def put(draw: Callable[..., Any], message: Message, field: FieldDescriptor, depth: int) -> None:
    """Sets a field to something, or to several things where it is repeated."""
    if field.message_type is not None:
        for _ in range(draw(st.integers(0, 3)) if field.is_repeated else 1):
            place = getattr(message, field.name).add() if field.is_repeated else getattr(message, field.name)
            place.SetInParent() if not field.is_repeated else None
            fill(draw, place, depth + 1)
    elif field.is_repeated:
        values = draw(st.lists(scalar(field), max_size=4))
        many = draw(st.sampled_from([1, 1, 1, 1, 40, 2000]))
        getattr(message, field.name).extend(values * many)
    else:
        setattr(message, field.name, draw(scalar(field)))


def fill(draw: Callable[..., Any], message: Message, depth: int = 0) -> None:
    """Sets some fields."""
    fields = list(message.DESCRIPTOR.fields)
    if not fields or depth > MAX_DEPTH:
        return
    for field in draw(st.lists(st.sampled_from(fields), max_size=len(fields), unique_by=lambda field: field.name)):
        put(draw, message, field, depth)


def places_in(message: Message) -> Iterator[tuple[Message, FieldDescriptor]]:
    """Every field of a message and of what it holds, those that are not set too."""
    for field in message.DESCRIPTOR.fields:
        yield message, field
        if field.message_type is None:
            continue
        inner = getattr(message, field.name)
        if field.is_repeated:
            for one in list(inner)[:3]:
                yield from places_in(one)
        elif message.HasField(field.name):
            yield from places_in(inner)


@st.composite
def spoilt(draw: Callable[..., Any], good: Message) -> Message:
    """A good message with a few fields replaced, emptied or doubled."""
    message = type(good)()
    message.CopyFrom(good)
    for _ in range(draw(st.integers(0, 2))):
        places = list(places_in(message))
        if not places:
            return message
        place, field = draw(st.sampled_from(places))
        what = draw(st.sampled_from(["replace", "replace", "clear", "add"]))
        if what != "add" or not field.is_repeated:
            place.ClearField(field.name)
        if what != "clear":
            put(draw, place, field, MAX_DEPTH - 1)
    return message


@st.composite
def random_message(draw: Callable[..., Any], kind: type[Message]) -> Message:
    """One that only its descriptor speaks for."""
    message = kind()
    fill(draw, message)
    return message


@st.composite
def damaged(draw: Callable[..., Any], whole: bytes) -> bytes:
    """Bytes with some lost, changed or added; often no message any more, or one with text that is no UTF-8."""
    data = bytearray(whole)
    at = draw(st.integers(0, max(0, len(data) - 1)))
    match draw(st.sampled_from(["cut", "flip", "insert", "append", "unknown"])):
        case "cut":
            del data[at:]
        case "flip" if data:
            data[at] ^= draw(st.sampled_from([1, 0x80, 0xFF]))
        case "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        case "append":
            data += draw(st.binary(min_size=1, max_size=8))
        case "unknown":
            data += b"\xfa\x7f\x03abc\x80\x7d\x01"  # fields 2047 and 2000, of no release
    return bytes(data)


def requests(good: Sequence[Message]) -> st.SearchStrategy[bytes]:
    """Messages of one kind, as bytes: good ones spoilt, wild ones, and either damaged."""
    whole = st.sampled_from(list(good)).flatmap(spoilt) | random_message(type(good[0]))
    told = whole.map(lambda message: message.SerializeToString())
    return st.one_of(told, told, told, told.flatmap(damaged))
