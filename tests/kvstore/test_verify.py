"""What an upload must be: the verifier that sees bytes as they pass, against opening the whole object at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvstore_worlds import announced, make_chunk

from spolia_core.chunk_object import parse_chunk_object
from spolia_core.digests import FRAME_BYTES, digest, frames
from spolia_core.errors import DataCorrupt, InvalidRequest, SpoliaError
from spolia_core.reuse import ChunkKind
from spolia_kvstore.objects import ObjectRecord
from spolia_kvstore.verify import ObjectVerifier, check_record

SMALL = settings(max_examples=80, deadline=None, derandomize=True, database=None)
CHUNK = make_chunk(1)
LARGE = make_chunk(2, num_tokens=300, head_dim=256)
HEAD_BYTES = 8 + int.from_bytes(CHUNK.data[:8], "little")
CUTS = st.lists(st.integers(0, len(CHUNK.data)), max_size=8)


def fed(record: ObjectRecord, data: bytes, cuts: list[int]) -> ObjectVerifier:
    verifier = ObjectVerifier(record)
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(data)], strict=True):
        verifier.feed(memoryview(data)[start:end])
    return verifier


def verdict(record: ObjectRecord, data: bytes, cuts: list[int]) -> type[SpoliaError] | None:
    try:
        fed(record, data, cuts).finish()
    except SpoliaError as error:
        return type(error)
    return None


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def honest(data: bytes) -> ObjectRecord:
    """Announces `data` as chunk 1, by the digest that it has."""
    return replace(announced(CHUNK), digest=digest(data), size_bytes=len(data))


@SMALL
@given(CUTS)
def test_an_object_is_taken_however_its_bytes_are_cut(cuts: list[int]) -> None:
    verifier = fed(announced(CHUNK), CHUNK.data, cuts)
    verifier.finish()
    assert verifier.head.meta == parse_chunk_object(CHUNK.data).meta
    assert verifier.frame_digests == (digest(CHUNK.data),)


@SMALL
@given(st.lists(st.integers(0, len(LARGE.data)), max_size=5))
def test_frame_digests_are_those_of_the_frames_however_the_bytes_are_cut(cuts: list[int]) -> None:
    assert len(LARGE.data) > 2 * FRAME_BYTES
    verifier = fed(announced(LARGE), LARGE.data, [*cuts, FRAME_BYTES, FRAME_BYTES + 1])
    verifier.finish()
    assert verifier.frame_digests == tuple(each for _, _, each in frames(LARGE.data))


@SMALL
@given(st.integers(0, 8 * len(CHUNK.data) - 1), CUTS)
def test_a_bit_flipped_on_the_way_is_damage_wherever_it_is(bit: int, cuts: list[int]) -> None:
    assert verdict(announced(CHUNK), flipped(CHUNK.data, bit), cuts) is DataCorrupt


@SMALL
@given(st.integers(0, 8 * len(CHUNK.data) - 1), CUTS)
def test_a_bit_flipped_before_the_digest_was_taken_is_found_unless_it_changes_nothing(
    bit: int, cuts: list[int]
) -> None:
    data = flipped(CHUNK.data, bit)
    found = verdict(honest(data), data, cuts)
    try:
        is_the_same = parse_chunk_object(data).meta == parse_chunk_object(CHUNK.data).meta
    except SpoliaError:
        is_the_same = False
    assert (found is None) == is_the_same
    if bit // 8 >= HEAD_BYTES:
        assert found is DataCorrupt, "a layer's digest is in the head"
    else:
        assert found in (None, InvalidRequest), "it was sent as it was meant, and is no object"


@SMALL
@given(st.binary(min_size=1, max_size=60), CUTS)
def test_bytes_that_are_no_object_are_refused(data: bytes, cuts: list[int]) -> None:
    assert verdict(honest(data), data, [cut % len(data) for cut in cuts]) is InvalidRequest


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("info.chunk_id", {"key": announced(make_chunk(2)).key}),
        ("info.kind", {"kind": ChunkKind.PREFIX}),
        ("info.fingerprint", {"fingerprint": bytes(32)}),
        ("info.num_tokens", {"num_tokens": 9}),
    ],
)
def test_an_object_that_is_not_what_was_announced_is_refused_by_field(field: str, change: dict[str, object]) -> None:
    verifier = fed(replace(announced(CHUNK), **change), CHUNK.data, [])  # type: ignore[arg-type]  # fields differ in type
    with pytest.raises(InvalidRequest) as caught:
        verifier.finish()
    assert caught.value.field == field


def test_damage_to_a_layer_names_the_layer() -> None:
    data = flipped(CHUNK.data, 8 * (len(CHUNK.data) - 1))
    with pytest.raises(DataCorrupt, match="layer 1"):
        fed(honest(data), data, []).finish()


@pytest.mark.parametrize("size", [1, 7, 8, HEAD_BYTES - 1, HEAD_BYTES, len(CHUNK.data) - 1])
def test_a_prefix_of_an_object_is_no_object(size: int) -> None:
    data = CHUNK.data[:size]
    assert verdict(honest(data), data, []) is InvalidRequest


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("info.format_version", {"format_version": 2}),
        ("info.codec", {"codec": "zip"}),
        ("info.num_tokens", {"num_tokens": 0}),
        ("info.size_bytes", {"size_bytes": 0}),
        ("info.size_bytes", {"size_bytes": 10_001}),
        *(("info.compute_s", {"compute_s": value}) for value in (-1.0, float("nan"), float("inf"))),
    ],
)
def test_a_record_that_cannot_be_kept_is_refused_by_field(field: str, change: dict[str, object]) -> None:
    check_record(announced(CHUNK), 10_000)
    with pytest.raises(InvalidRequest) as caught:
        check_record(replace(announced(CHUNK), **change), 10_000)  # type: ignore[arg-type]  # fields differ in type
    assert caught.value.field == field
