"""Values survive the wire, and what is unset or unknown there is met by name."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spolia.v1 import common_pb2
from spolia_core.chunk_object import ChunkMeta, KvShape
from spolia_core.constraint import Constraint
from spolia_core.digests import digest
from spolia_core.errors import InvalidRequest, NotSupported
from spolia_core.prompt import Part, Prompt
from spolia_core.reuse import ChunkKind, Miss, MissReason, ReuseMode, ReuseReport, SourceRun, TokenSource
from spolia_core.sampling import SamplingParams
from spolia_node.rpc_messages import (
    mode_from_pb,
    object_info,
    prompt_from_pb,
    prompt_to_pb,
    report_from_pb,
    report_to_pb,
    sampling_from_pb,
    sampling_to_pb,
)

uint32 = st.integers(0, 2**32 - 1)
uint64 = st.integers(0, 2**64 - 1)
hundredths = st.integers(1, 100).map(lambda n: n / 100)
texts = st.text(min_size=1, max_size=16)
constraints = (
    st.just(Constraint.json_object())
    | st.builds(Constraint.json_schema, st.dictionaries(st.text(max_size=9), st.integers(), max_size=3))
    | st.builds(Constraint.regex, texts)
    | st.builds(Constraint.one_of, st.lists(texts, min_size=1, max_size=4, unique=True))
    | st.builds(Constraint.lark, texts)
)
samplings = st.builds(
    SamplingParams,
    temperature=hundredths,
    top_p=hundredths,
    top_k=uint32,
    seed=uint64,
    max_tokens=st.integers(1, 2**32 - 1),
    stop=st.lists(st.text(min_size=1, max_size=16).filter(lambda s: s.isprintable()), max_size=4).map(tuple),
    ignore_eos=st.booleans(),
) | st.builds(SamplingParams, constraint=constraints)
misses = st.builds(
    Miss, chunk_id=st.binary(), kind=st.sampled_from(ChunkKind), reason=st.sampled_from(MissReason), num_tokens=uint32
)
reports = st.builds(
    ReuseReport,
    mode=st.sampled_from(ReuseMode),
    sources=st.dictionaries(st.sampled_from(TokenSource), st.integers(1, 2**32 - 1)).map(Counter),
    misses=st.lists(misses, max_size=3),
    chunk_bytes=uint64,
    live_bytes=uint64,
    inline_bytes=uint64,
    profile=st.text().filter(lambda s: s.isprintable()),
    link_tokens_per_chunk=uint32,
    forced=st.booleans(),
    sink_tokens_per_chunk=uint32,
    nodes=st.lists(st.sampled_from(["decode-1", "prefill-2"])),
    runs=st.lists(st.builds(SourceRun, source=st.sampled_from(TokenSource), num_tokens=uint32), max_size=3),
)
parts = st.builds(Part, token_ids=st.lists(uint32).map(tuple), chunk_id=st.none() | st.binary(min_size=32, max_size=32))


def wired(message: Any) -> Any:
    """The message after the wire."""
    return type(message).FromString(message.SerializeToString())


@given(samplings)
def test_sampling_survives_the_wire_decimals_included(params: SamplingParams):
    assert sampling_from_pb(wired(sampling_to_pb(params)), default_seed=7) == params


@given(reports)
def test_a_report_survives_the_wire(report: ReuseReport):
    assert report_from_pb(wired(report_to_pb(report))) == report


@given(st.lists(parts).map(lambda ps: Prompt(tuple(ps))))
def test_a_prompt_survives_the_wire(prompt: Prompt):
    assert prompt_from_pb([wired(part) for part in prompt_to_pb(prompt)]) == prompt


def test_unset_sampling_fields_get_their_defaults():
    params = sampling_from_pb(common_pb2.SamplingParams(), default_seed=7)
    assert params == SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=7, max_tokens=256)
    assert sampling_from_pb(common_pb2.SamplingParams(), default_seed=0, default_max_tokens=3).max_tokens == 3
    explicit = common_pb2.SamplingParams(seed=0, max_tokens=1)
    assert sampling_from_pb(explicit, default_seed=7, default_max_tokens=3).seed == 0


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"temperature": -1.0}, "sampling.temperature"),
        ({"temperature": float("nan")}, "sampling.temperature"),
        ({"temperature": float("inf")}, "sampling.temperature"),
        ({"top_p": 0.0}, "sampling.top_p"),
        ({"max_tokens": 0}, "sampling.max_tokens"),
        ({"stop": [""]}, "sampling.stop"),
    ],
)
def test_a_bad_sampling_field_is_refused_by_name_even_where_it_equals_the_wires_zero(bad: dict[str, Any], field: str):
    with pytest.raises(InvalidRequest) as refused:
        sampling_from_pb(common_pb2.SamplingParams(**bad), default_seed=0)
    assert refused.value.field == field


def test_bytes_of_other_planes_are_not_counted_as_grpcs():
    message = common_pb2.ReuseReport(
        mode=common_pb2.REUSE_MODE_EXACT,
        transfers=[
            common_pb2.TransferCount(plane=common_pb2.DATA_PLANE_GRPC, chunk_bytes=5),
            common_pb2.TransferCount(plane=common_pb2.DATA_PLANE_NIXL, chunk_bytes=7),
        ],
    )
    assert report_from_pb(message).chunk_bytes == 5


def test_nothing_moved_is_no_transfer_and_no_tokens_is_no_source():
    report = ReuseReport(ReuseMode.EXACT, sources=Counter({TokenSource.DEVICE: 0, TokenSource.COMPUTED: 3}))
    message = report_to_pb(report)
    assert not message.transfers
    assert [count.num_tokens for count in message.sources] == [3]


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (common_pb2.ReuseReport(), "reuse.mode"),
        (common_pb2.ReuseReport(mode=1, sources=[common_pb2.SourceCount(source=99)]), "reuse.sources"),  # type: ignore[arg-type]  # a number of no enum
        (common_pb2.ReuseReport(mode=1, misses=[common_pb2.Miss(kind=1, reason=99)]), "reuse.misses.reason"),  # type: ignore[arg-type]  # a number of no enum
    ],
)
def test_a_newer_nodes_vocabulary_is_refused_by_name(message: common_pb2.ReuseReport, field: str):
    with pytest.raises(NotSupported) as refused:
        report_from_pb(message)
    assert refused.value.field == field


def test_a_mode_left_open_means_what_the_caller_says_or_is_refused():
    assert mode_from_pb(common_pb2.REUSE_MODE_LINKED) is ReuseMode.LINKED
    assert mode_from_pb(common_pb2.REUSE_MODE_UNSPECIFIED, unspecified=ReuseMode.EXACT) is ReuseMode.EXACT
    for number in (0, 99):
        with pytest.raises(InvalidRequest, match=f"mode must be EXACT, LINKED, got {number}"):
            mode_from_pb(number)


def test_a_chunk_id_of_a_wrong_length_is_refused_with_its_place():
    sent = [common_pb2.TokenPart(token_ids=[1]), common_pb2.TokenPart(token_ids=[2], chunk_id=b"short")]
    with pytest.raises(InvalidRequest, match="32 bytes") as refused:
        prompt_from_pb(sent)
    assert refused.value.field == "parts[1].chunk_id"


def test_object_info_says_what_the_bytes_are():
    meta = ChunkMeta(b"c" * 32, ChunkKind.LOCAL, b"f" * 32, 5, KvShape(1, 1, 4, 4, "F32"))
    data = bytes(range(256))
    info = object_info(meta, memoryview(data), replica="r1")
    assert info == object_info(meta, bytearray(data), replica="r1")
    assert (info.chunk_id, info.kind, info.fingerprint) == (
        meta.chunk_id,
        common_pb2.CHUNK_KIND_LOCAL,
        meta.fingerprint,
    )
    assert (info.num_tokens, info.size_bytes, info.digest) == (5, 256, digest(data))
    assert (info.codec, info.format_version, info.replica) == ("raw", 1, "r1")


@pytest.mark.parametrize(
    ("core", "wire"),
    [
        (ReuseMode, common_pb2.ReuseMode),
        (ChunkKind, common_pb2.ChunkKind),
        (MissReason, common_pb2.MissReason),
        (TokenSource, common_pb2.TokenSource),
    ],
)
def test_every_word_of_the_wire_but_unspecified_is_known_under_the_same_number(core: Any, wire: Any):
    prefix = wire.DESCRIPTOR.values[0].name.removesuffix("UNSPECIFIED")
    named = {value.name.removeprefix(prefix): value.number for value in wire.DESCRIPTOR.values if value.number}
    assert named == {member.name: member.value for member in core}
