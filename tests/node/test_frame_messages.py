"""Frames written and read without protobuf's classes are what these write and read."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from spolia.v1.common_pb2 import Frame, ObjectInfo
from spolia.v1.kvstore_pb2 import GetHeader, GetResponse, LookupEntry, PutHeader, PutRequest
from spolia_core.digests import digest
from spolia_core.errors import DataCorrupt, InvalidRequest
from spolia_node.frame_messages import ReceivedFrame, frame_message, read_get, read_put, serialized

OFFSETS = st.sampled_from([0, 1, 127, 128, 512 << 10, (1 << 32) - 1, 1 << 32, (1 << 64) - 1])
DATA = st.binary(max_size=300)
HEADER = GetHeader(index=3, entry=LookupEntry(info=ObjectInfo(chunk_id=b"c" * 32, size_bytes=1 << 40)))


def by_protobuf(offset: int, data: bytes, frame_digest: bytes) -> GetResponse:
    return GetResponse(frame=Frame(offset=offset, data=data, digest=frame_digest))


def as_read_by_protobuf(message: bytes) -> ReceivedFrame | GetHeader:
    response = GetResponse.FromString(message)
    if not response.HasField("frame"):
        return response.header
    return ReceivedFrame(response.frame.offset, memoryview(response.frame.data), response.frame.digest)


@given(offset=OFFSETS, pieces=st.lists(DATA, min_size=1, max_size=4))
def test_a_frame_is_written_as_protobuf_writes_it(offset: int, pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    expected = by_protobuf(offset, data, digest(data))
    message = frame_message(offset, [memoryview(piece) for piece in pieces], digest(data))
    assert GetResponse.FromString(message) == expected
    if data:  # an empty field is left out there
        assert message == expected.SerializeToString()


@given(offset=OFFSETS, data=DATA, frame_digest=st.sampled_from([bytes(range(16)), b"", b"short", bytes(17)]))
def test_a_frame_is_read_whatever_its_digest(offset: int, data: bytes, frame_digest: bytes) -> None:
    message = by_protobuf(offset, data, frame_digest).SerializeToString()
    assert read_get(message) == ReceivedFrame(offset, memoryview(data), frame_digest)


@given(offset=OFFSETS, data=DATA, frame_digest=st.sampled_from([bytes(range(16)), b"short"]))
def test_a_frame_of_a_put_is_that_of_a_get(offset: int, data: bytes, frame_digest: bytes) -> None:
    request = PutRequest(frame=Frame(offset=offset, data=data, digest=frame_digest))
    assert PutRequest.FromString(frame_message(offset, [data], frame_digest)) == request
    assert read_put(request.SerializeToString()) == ReceivedFrame(offset, memoryview(data), frame_digest)


def test_what_is_no_frame_of_a_put_is_as_it_came() -> None:
    for request in (PutRequest(header=PutHeader(tenant_id="t", claim_owner="o")), PutRequest()):
        assert read_put(serialized(request)) == request
    with pytest.raises(InvalidRequest, match=r"2 bytes are no spolia\.v1\.PutRequest"):
        read_put(b"\x12\xff")


def test_the_data_of_a_frame_are_no_copy() -> None:
    message = frame_message(7, [b"x" * 1000], bytes(16))
    received = read_get(message)
    assert isinstance(received, ReceivedFrame)
    assert received.data.obj is message


def test_a_header_is_read_and_sent_as_it_is() -> None:
    response = GetResponse(header=HEADER)
    assert read_get(serialized(response)) == HEADER
    assert read_get(b"") == GetHeader(), "what a message without fields is to protobuf"
    message = frame_message(0, [b"data"], bytes(16))
    assert serialized(message) is message


@pytest.mark.parametrize(
    "fields",
    [
        b"\x1a\x10" + bytes(16) + b"\x12\x03abc",  # another order
        b"\x12\x03xyz\x12\x03abc\x1a\x10" + bytes(16),  # data twice: the last counts
        b"\x12\x03abc\x1a\x10" + bytes(16) + b"\x22\x05later",  # a field of a newer release
        b"\x12\x83\x00abc\x1a\x10" + bytes(16),  # a length in more bytes than it needs
    ],
)
def test_a_frame_that_others_lay_out_otherwise_is_read_too(fields: bytes) -> None:
    message = b"\x12" + bytes([len(fields)]) + fields
    assert read_get(message) == ReceivedFrame(0, memoryview(b"abc"), bytes(16))
    newer = message + b"\x1a\x05later"
    assert read_get(newer) == ReceivedFrame(0, memoryview(b"abc"), bytes(16))


@given(data=DATA, at=st.integers(0, 400), flip=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_message_is_read_as_protobuf_reads_it_or_is_corrupt(
    data: bytes, at: int, flip: int, cut: bool
) -> None:
    message = bytearray(frame_message(1 << 20, [data], digest(data)))
    at %= len(message)
    if cut:
        del message[at:]
    else:
        message[at] ^= flip
    damaged = bytes(message)
    try:
        expected = as_read_by_protobuf(damaged)
    except DecodeError:
        with pytest.raises(DataCorrupt):
            read_get(damaged)
    else:
        assert read_get(damaged) == expected
