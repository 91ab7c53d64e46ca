"""Chunk objects: what goes in comes out, any safetensors reader can look, and damage is always seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from core_worlds import SHAPE, layers_of, meta_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from spolia_core.chunk_object import ChunkMeta, KvShape, build_chunk_object, parse_chunk_object
from spolia_core.errors import DataCorrupt, NotSupported, SpoliaError
from spolia_core.reuse import ChunkKind


def built(meta: ChunkMeta) -> bytes:
    return build_chunk_object(meta, layers_of(meta))


@given(
    st.integers(1, 9),
    st.builds(
        KvShape,
        num_layers=st.integers(1, 3),
        num_kv_heads=st.integers(1, 3),
        head_dim=st.integers(1, 5),
        v_dim=st.integers(1, 5),
        dtype=st.sampled_from(["F32", "F16", "BF16"]),
    ),
    st.sampled_from(list(ChunkKind)),
    st.integers(0, 1 << 40),
    st.binary(min_size=32, max_size=32),
)
@settings(max_examples=80)
def test_an_object_opens_as_what_was_built(n: int, shape: KvShape, kind: ChunkKind, base: int, chunk_id: bytes) -> None:
    meta = meta_of(n, shape, kind=kind, rope_base=base, chunk_id=chunk_id)
    for data in (built(meta), bytearray(built(meta)), memoryview(built(meta))):
        parsed = parse_chunk_object(data)
        assert parsed.meta == meta
        assert [(bytes(k), bytes(v)) for k, v in parsed.layers] == [(bytes(k), bytes(v)) for k, v in layers_of(meta)]
    assert len(built(meta)) > n * shape.bytes_per_token


def test_layers_are_views_of_the_object() -> None:
    data = bytearray(built(meta_of()))
    parsed = parse_chunk_object(data)
    data[-1] ^= 0xFF
    assert parsed.layers[-1][1][-1] == data[-1]


def test_any_safetensors_reader_opens_it(tmp_path: Path) -> None:
    meta = meta_of()
    path = tmp_path / "chunk.safetensors"
    path.write_bytes(built(meta))
    with safe_open(path, framework="np") as opened:
        assert sorted(opened.keys()) == ["0.k", "0.v", "1.k", "1.v"]
        assert opened.metadata()["spolia.kind"] == "LOCAL"
        for layer, (key, value) in enumerate(layers_of(meta)):
            assert opened.get_tensor(f"{layer}.k").tobytes() == bytes(key)
            assert opened.get_tensor(f"{layer}.k").shape == (2, 3, 4)
            assert opened.get_tensor(f"{layer}.v").tobytes() == bytes(value)
            assert opened.get_tensor(f"{layer}.v").shape == (2, 3, 2)


def test_a_layer_lies_in_one_piece_keys_first() -> None:
    meta = meta_of()
    data = built(meta)
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert body == b"".join(bytes(part) for layer in layers_of(meta) for part in layer)
    assert (len(data) - len(body)) % 8 == 0


@pytest.mark.parametrize("flip", [0x01, 0x02, 0x10, 0x20, 0x80, 0xFF])
def test_every_flipped_byte_is_found_or_changes_nothing(flip: int) -> None:
    meta = meta_of(2, KvShape(1, 1, 2, 2, "F16"), kind=ChunkKind.PREFIX, rope_base=128)
    whole = built(meta)
    expected = [(bytes(k), bytes(v)) for k, v in layers_of(meta)]
    num_found = 0
    for index in range(len(whole)):
        damaged = bytearray(whole)
        damaged[index] ^= flip
        try:
            parsed = parse_chunk_object(damaged)
        except (DataCorrupt, NotSupported):
            num_found += 1
            continue
        assert parsed.meta == meta, f"byte {index} turned the object into {parsed.meta}"
        assert [(bytes(k), bytes(v)) for k, v in parsed.layers] == expected, f"byte {index}"
    assert num_found > len(whole) - 16  # spaces that pad the header may turn into other spaces


@given(st.data())
@settings(max_examples=200)
def test_any_damage_is_a_typed_error_or_harmless(data: st.DataObject) -> None:
    meta = meta_of(2, KvShape(1, 1, 2, 2, "F16"))
    damaged = bytearray(built(meta))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(damaged)))
        damaged[start : start + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    try:
        parsed = parse_chunk_object(damaged)
    except (DataCorrupt, NotSupported):
        return
    assert parsed.meta == meta
    assert [(bytes(k), bytes(v)) for k, v in parsed.layers] == [(bytes(k), bytes(v)) for k, v in layers_of(meta)]


def test_every_truncation_is_corrupt() -> None:
    whole = built(meta_of(1, KvShape(1, 1, 1, 1, "F16")))
    for size in range(len(whole)):
        with pytest.raises(DataCorrupt):
            parse_chunk_object(whole[:size])
    with pytest.raises(DataCorrupt):
        parse_chunk_object(whole + b"\0")


def rewritten(change: dict[str, Any], tensors: dict[str, Any] | None = None) -> bytes:
    """An object whose metadata was changed by somebody who knows no digests."""
    whole = built(meta_of())
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    header["__metadata__"].update(change)
    header.update(tensors or {})
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + size :]


@pytest.mark.parametrize("version", ["2", "", "x", None, 1])
def test_an_unknown_version_is_not_supported(version: object) -> None:
    with pytest.raises(NotSupported) as caught:
        parse_chunk_object(rewritten({"spolia.format_version": version, "spolia.future": "field"}))
    assert caught.value.field == "format_version"


def test_an_unknown_codec_is_not_supported() -> None:
    with pytest.raises(NotSupported) as caught:
        parse_chunk_object(rewritten({"spolia.codec": "int4"}))
    assert (caught.value.field, caught.value.actual) == ("codec", "int4")


@pytest.mark.parametrize(
    "change",
    [
        {"spolia.rope_base": "128"},
        {"spolia.kind": "PREFIX"},
        {"spolia.fingerprint": "11" * 32},
        {"spolia.chunk_id": "22" * 32},
        {"spolia.num_tokens": "4"},
        {"spolia.shape": "2,2,4,2,F16"},
        {"spolia.layer_digests": "00,11"},
        {"spolia.metadata_digest": None},
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_changed_metadata_is_corrupt(change: dict[str, Any], verify: bool) -> None:
    with pytest.raises(DataCorrupt, match="metadata"):
        parse_chunk_object(rewritten(change), verify=verify)


@pytest.mark.parametrize(
    "tensors", [{"2.k": {}}, {"0.k": {"dtype": "F32", "shape": [2, 3, 4], "data_offsets": [0, 1]}}]
)
def test_tensors_in_other_places_are_corrupt(tensors: dict[str, Any]) -> None:
    with pytest.raises(DataCorrupt, match="laid out"):
        parse_chunk_object(rewritten({}, tensors))


def test_unverified_layers_are_the_callers_risk() -> None:
    damaged = bytearray(built(meta_of()))
    damaged[-1] ^= 1
    assert parse_chunk_object(damaged, verify=False).meta == meta_of()
    with pytest.raises(DataCorrupt, match="layer 1"):
        parse_chunk_object(damaged)


def framed(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 8,
        b"\xff" * 64,
        framed(b"null"),
        framed(b"[]"),
        framed(b"{}"),
        framed(b'{"__metadata__": 3}'),
        framed(b'{"__metadata__": {}}'),
        framed(b"\xff\xfe"),
        framed(b"[" * 200_000),
        framed(b'{"a": ' + b"9" * 5000 + b"}"),
    ],
)
def test_what_is_no_object_is_a_typed_error(data: bytes) -> None:
    with pytest.raises(SpoliaError):
        parse_chunk_object(data)


def test_layers_of_a_wrong_size_cannot_be_built() -> None:
    meta = meta_of()
    with pytest.raises(AssertionError, match="1 layers given"):
        build_chunk_object(meta, layers_of(meta)[:1])
    with pytest.raises(AssertionError, match="layer 0"):
        build_chunk_object(meta, [(k, v[:-1]) for k, v in layers_of(meta)])


def test_sizes_follow_from_shape_and_tokens() -> None:
    assert SHAPE.key_bytes(3) == 2 * 3 * 4 * 4
    assert SHAPE.value_bytes(3) == 2 * 3 * 2 * 4
    assert SHAPE.layer_bytes(3) == SHAPE.key_bytes(3) + SHAPE.value_bytes(3)
    assert SHAPE.bytes_per_token * 3 == 2 * SHAPE.layer_bytes(3)
