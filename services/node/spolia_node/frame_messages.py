"""Messages of Get and Put whose bytes are copied once each way: written from where they lie, read where they arrived.

A frame is nearly all data, and protobuf's classes copy that into a message, out of it, and once more where it is read:
as much time as the sockets take. So frames are written and read here, by the encoding of protobuf, which any other
reader and writer of `GetResponse` and `PutRequest` understands; whatever is not laid out as this release lays a frame
out is left to the generated classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import DecodeError

from spolia.v1 import kvstore_pb2
from spolia.v1.common_pb2 import Frame
from spolia.v1.kvstore_pb2 import GetHeader, GetRequest, GetResponse, PutRequest, PutResponse
from spolia.v1.kvstore_pb2_grpc import KVStoreServiceStub
from spolia_core.digests import DIGEST_BYTES
from spolia_core.errors import DataCorrupt, InvalidRequest

if TYPE_CHECKING:
    from spolia.v1.kvstore_pb2_grpc import KVStoreServiceAsyncStub  # a name for types, absent at run time

GetCall = grpc.aio.UnaryStreamCall[GetRequest, bytes]

SERVICE = kvstore_pb2.DESCRIPTOR.services_by_name["KVStoreService"].full_name
_VARINT, _LENGTH = 0, 2
"""Wire types: a number, and bytes behind their length."""

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class ReceivedFrame:
    """A `Frame` as it came; `data` is a view of the message."""

    offset: int
    data: memoryview
    digest: bytes


def open_get(
    channel: grpc.aio.Channel, request: GetRequest, timeout_s: float, metadata: Sequence[tuple[str, str]] | None
) -> GetCall:
    """Calls Get; what comes is for `read_message`."""
    get: grpc.aio.UnaryStreamMultiCallable[GetRequest, bytes] = channel.unary_stream(
        f"/{SERVICE}/Get", request_serializer=GetRequest.SerializeToString, response_deserializer=None
    )
    return get(request, timeout=timeout_s, metadata=metadata)


def stub_of(channel: grpc.aio.Channel) -> KVStoreServiceAsyncStub:
    """The generated stub, but that its Put takes requests as `serialized` does."""
    stub: KVStoreServiceAsyncStub = KVStoreServiceStub(channel)
    stub.Put = channel.stream_unary(
        f"/{SERVICE}/Put", request_serializer=serialized, response_deserializer=PutResponse.FromString
    )
    return stub


def frame_message(offset: int, pieces: Sequence[Bytes], digest: bytes) -> bytes:
    """A serialised `GetResponse`, or `PutRequest`, with a frame whose data are `pieces`, one behind the other."""
    size = sum(map(len, pieces))
    start = b"" if offset == 0 else _key(Frame.OFFSET_FIELD_NUMBER, _VARINT) + _varint(offset)
    start += _key(Frame.DATA_FIELD_NUMBER, _LENGTH) + _varint(size)
    end = _key(Frame.DIGEST_FIELD_NUMBER, _LENGTH) + _varint(len(digest)) + digest
    head = _FRAME_START + _varint(len(start) + size + len(end))
    return b"".join((head, start, *pieces, end))


def serialized(message: GetResponse | PutRequest | bytes) -> bytes:
    """As gRPC is to send it; what is bytes was made by `frame_message`."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def read_put(message: bytes) -> ReceivedFrame | PutRequest:
    """The frame that a `PutRequest` holds; any other as it is. Raises `InvalidRequest` for bytes that are none."""
    frame = _frame_of(message)
    if frame is not None:
        return frame
    try:
        request = PutRequest.FromString(message)
    except DecodeError as error:
        name = PutRequest.DESCRIPTOR.full_name
        raise InvalidRequest(f"{len(message)} bytes are no {name}: {error}", limit=name) from error
    return _received(request.frame) if request.HasField("frame") else request


def read_get(message: bytes) -> ReceivedFrame | GetHeader:
    """What a `GetResponse` holds. Raises `DataCorrupt` for bytes that are none."""
    frame = _frame_of(message)
    if frame is not None:
        return frame
    try:
        response = GetResponse.FromString(message)
    except DecodeError as error:
        raise DataCorrupt(f"{len(message)} bytes of the store's are no GetResponse: {error}") from error
    return _received(response.frame) if response.HasField("frame") else response.header


def _received(frame: Frame) -> ReceivedFrame:
    return ReceivedFrame(frame.offset, memoryview(frame.data), frame.digest)


def _frame_of(message: bytes) -> ReceivedFrame | None:
    """The frame of a message that `frame_message` could have made; None for any other."""
    try:
        if message[:1] != _FRAME_START:
            return None
        size, at = _read_varint(message, 1)
        if at + size != len(message):
            return None
        offset = 0
        if message[at] == _OFFSET_KEY:
            offset, at = _read_varint(message, at + 1)
        if message[at] != _DATA_KEY:
            return None
        size, start = _read_varint(message, at + 1)
        end = start + size
        if message[end : end + 2] != _DIGEST_START or end + 2 + DIGEST_BYTES != len(message):
            return None
    except IndexError:
        return None
    return ReceivedFrame(offset, memoryview(message)[start:end], message[end + 2 :])


def _key(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last have the eighth set."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """A number, and where the next field begins. Raises `IndexError` where it has no end within 64 bits."""
    number = shift = 0
    while shift < 64:
        byte = message[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte <= 0x7F:
            return number, at
        shift += 7
    raise IndexError


_FRAME_START = _key(GetResponse.FRAME_FIELD_NUMBER, _LENGTH)
assert GetResponse.FRAME_FIELD_NUMBER == PutRequest.FRAME_FIELD_NUMBER, "a frame is the same message both ways"
_OFFSET_KEY = _key(Frame.OFFSET_FIELD_NUMBER, _VARINT)[0]
_DATA_KEY = _key(Frame.DATA_FIELD_NUMBER, _LENGTH)[0]
_DIGEST_START = _key(Frame.DIGEST_FIELD_NUMBER, _LENGTH) + _varint(DIGEST_BYTES)
