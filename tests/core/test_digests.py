"""Digests and frames of KV bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spolia_core.digests import DIGEST_BYTES, check_digest, digest, frames
from spolia_core.errors import DataCorrupt


def test_digests_are_what_they_have_always_been() -> None:
    assert digest(b"").hex() == "99aa06d3014798d86001c324468d497f"
    assert digest(b"spolia").hex() == "764f9c94040a2370a3e6bb547e737507"
    assert len(digest(b"x")) == DIGEST_BYTES


@given(st.binary(min_size=1, max_size=64), st.integers(0, 511))
def test_a_flipped_bit_is_found(data: bytes, bit: int) -> None:
    damaged = bytearray(data)
    damaged[bit // 8 % len(data)] ^= 1 << bit % 8
    check_digest(data, digest(data), "frame")
    with pytest.raises(DataCorrupt, match="digest of frame 7") as caught:
        check_digest(damaged, digest(data), "frame 7")
    assert caught.value.limit == digest(data).hex()
    assert caught.value.actual == digest(damaged).hex()


@given(st.binary(max_size=50), st.integers(1, 60))
def test_frames_are_the_data_in_order_without_gaps(data: bytes, size: int) -> None:
    found = list(frames(data, size))
    assert b"".join(piece for _, piece, _ in found) == data
    position = 0
    for offset, piece, its_digest in found:
        assert offset == position
        assert 1 <= len(piece) <= size
        check_digest(piece, its_digest, "frame")
        position += len(piece)


def test_bytes_of_any_kind_are_framed_alike() -> None:
    data = bytes(range(200))
    assert list(frames(bytearray(data), 64)) == list(frames(memoryview(data), 64)) == list(frames(data, 64))
