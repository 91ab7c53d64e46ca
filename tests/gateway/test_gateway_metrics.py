"""What a gateway counts: every name from the first moment, and what reuse reports add up to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from gateway_fakes import FakeDecode, answers, fails_after, finish
from gateway_worlds import text_request, world

from spolia.v1 import common_pb2
from spolia_core.errors import InvalidRequest
from spolia_core.reuse import ChunkKind, MissReason, ReuseMode, TokenSource
from spolia_gateway.metrics import PLANES, FirstToken, GatewayMetrics
from spolia_node.metrics import Metrics

TENANT = "museum"
COMPUTED = ("COMPUTED", "LINK", "COMPILED")


def report(**fields: Any) -> common_pb2.Finish:
    return common_pb2.Finish(reuse=common_pb2.ReuseReport(mode=common_pb2.REUSE_MODE_LINKED, **fields))


def miss(kind: int, reason: int, num_tokens: int) -> common_pb2.Miss:
    """Also of numbers that this release has no names for."""
    made = common_pb2.Miss(chunk_id=bytes(32), num_tokens=num_tokens)
    made.kind, made.reason = kind, reason  # type: ignore[assignment]  # any number may come over the wire
    return made


KNOWN = report(
    sources=[
        common_pb2.SourceCount(source=common_pb2.TOKEN_SOURCE_COMPUTED, num_tokens=20),
        common_pb2.SourceCount(source=common_pb2.TOKEN_SOURCE_DEVICE, num_tokens=50),
        common_pb2.SourceCount(source=common_pb2.TOKEN_SOURCE_HOST, num_tokens=30),
    ],
    misses=[miss(1, 1, 40), miss(1, 1, 60), miss(2, 5, 128)],
    transfers=[
        common_pb2.TransferCount(plane=common_pb2.DATA_PLANE_GRPC, chunk_bytes=7, live_bytes=5, inline_bytes=3),
        common_pb2.TransferCount(plane=common_pb2.DATA_PLANE_NIXL, chunk_bytes=11),
    ],
)


def series(metrics: Metrics) -> set[tuple[str, tuple[str, ...]]]:
    """Every sample of the gateway's own: name and label values."""
    return {
        (sample.name, tuple(sorted(sample.labels.values())))
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name.startswith("spolia_gateway_")
    }


def test_every_series_is_there_before_the_first_request() -> None:
    metrics = Metrics()
    gateway = GatewayMetrics(metrics, TENANT)
    before = series(metrics)
    gateway.count_finish(TENANT, ReuseMode.LINKED, KNOWN)
    gateway.count_tokens(TENANT, 1)
    gateway.count_replay(TENANT)
    gateway.request_arrived().passed_on(1, ReuseMode.EXACT)
    assert series(metrics) == before
    count = metrics.registry.get_sample_value
    for kind in ChunkKind:
        for reason in MissReason:
            labels = {"tenant": TENANT, "kind": kind.name, "reason": reason.name}
            assert count("spolia_gateway_misses_total", labels) is not None, labels
            assert count("spolia_gateway_missed_tokens_total", labels) is not None, labels
    for source in TokenSource:
        assert count("spolia_gateway_prompt_tokens_total", {"tenant": TENANT, "source": source.name}) is not None


def test_the_names_are_those_of_the_contract() -> None:
    for core, contract, prefix in (
        (TokenSource, common_pb2.TokenSource, "TOKEN_SOURCE_"),
        (ChunkKind, common_pb2.ChunkKind, "CHUNK_KIND_"),
        (MissReason, common_pb2.MissReason, "MISS_REASON_"),
    ):
        named = {member.value: member.name for member in core}  # type: ignore[attr-defined]  # each an IntEnum
        assert named == {number: name.removeprefix(prefix) for name, number in contract.items() if number}
    planes = {number: name.removeprefix("DATA_PLANE_") for name, number in common_pb2.DataPlane.items() if number}
    assert planes == PLANES


def test_a_report_adds_to_tokens_misses_and_bytes() -> None:
    metrics = Metrics()
    gateway = GatewayMetrics(metrics, TENANT)
    for _ in range(2):
        gateway.count_finish(TENANT, ReuseMode.LINKED, KNOWN)
    value = metrics.value
    tokens = {s.name: value("spolia_gateway_prompt_tokens_total", tenant=TENANT, source=s.name) for s in TokenSource}
    reused = sum(count for name, count in tokens.items() if name not in COMPUTED)
    assert (reused, sum(tokens.values())) == (160, 200), "the hit rate is 80 %"
    not_found = {"tenant": TENANT, "kind": "LOCAL", "reason": "NOT_FOUND"}
    assert value("spolia_gateway_misses_total", **not_found) == 4
    assert value("spolia_gateway_missed_tokens_total", **not_found) == 200
    damaged = {"tenant": TENANT, "kind": "PREFIX", "reason": "DIGEST"}
    assert value("spolia_gateway_misses_total", **damaged) == 2
    assert value("spolia_gateway_missed_tokens_total", **damaged) == 256
    moved = {
        (kind, plane): value("spolia_gateway_kv_bytes_total", tenant=TENANT, kind=kind, plane=plane)
        for kind in ("CHUNK", "LIVE", "INLINE")
        for plane in ("GRPC", "NIXL")
    }
    assert {key: count for key, count in moved.items() if count} == {
        ("CHUNK", "GRPC"): 14,
        ("LIVE", "GRPC"): 10,
        ("INLINE", "GRPC"): 6,
        ("CHUNK", "NIXL"): 22,
    }


def test_what_a_newer_node_says_is_counted_under_its_number() -> None:
    newer = report(misses=[miss(9, 99, 12), miss(1, 99, 3)])
    newer.reuse.sources.add(num_tokens=8).source = 77  # type: ignore[assignment]  # any number may come over the wire
    newer.reuse.transfers.add(live_bytes=6).plane = 55  # type: ignore[assignment]  # a number no release knows
    received = common_pb2.Finish.FromString(newer.SerializeToString())
    metrics = Metrics()
    GatewayMetrics(metrics, TENANT).count_finish(TENANT, ReuseMode.EXACT, received)
    value = metrics.value
    assert value("spolia_gateway_missed_tokens_total", tenant=TENANT, kind="UNKNOWN_9", reason="UNKNOWN_99") == 12
    assert value("spolia_gateway_misses_total", tenant=TENANT, kind="LOCAL", reason="UNKNOWN_99") == 1
    assert value("spolia_gateway_prompt_tokens_total", tenant=TENANT, source="UNKNOWN_77") == 8
    assert value("spolia_gateway_kv_bytes_total", tenant=TENANT, kind="LIVE", plane="UNKNOWN_55") == 6


def test_the_time_to_the_first_token_is_taken_once_and_by_mode() -> None:
    metrics, clock = Metrics(), iter([10.0, 10.75, 11.0])
    histogram = metrics.histogram("spolia_gateway_ttft_seconds", "A stand-in.", "mode")
    first_token = FirstToken(histogram, lambda: next(clock))
    first_token.passed_on(0, ReuseMode.LINKED)  # text that was held back, without a token
    first_token.passed_on(1, ReuseMode.LINKED)
    first_token.passed_on(1, ReuseMode.LINKED)
    assert metrics.value("spolia_gateway_ttft_seconds_sum", mode="LINKED") == 0.75
    assert metrics.value("spolia_gateway_ttft_seconds_count", mode="LINKED") == 1
    assert next(clock) == 11.0, "later tokens do not look at the clock"


@pytest.mark.parametrize("mode", list(ReuseMode))
async def test_a_gateway_times_first_tokens_and_counts_reports_once(model: Path, mode: ReuseMode) -> None:
    async def dies_after_two(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        async for event in fails_after(2, None)(node, request, context):
            yield event

    async def slow_then_reports(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        await asyncio.sleep(0.05)
        async for event in answers(node, request, context):
            if event.HasField("finish"):
                event.finish.reuse.MergeFrom(KNOWN.reuse)
            yield event

    nodes = [FakeDecode("a", dies_after_two), FakeDecode("b", slow_then_reports)]
    async with world(model, decodes=nodes, tenant=TENANT) as w:
        await w.generate(text_request("the stones", mode=common_pb2.ReuseMode.ValueType(mode)))
        value = w.node.server.metrics.value
        assert value("spolia_gateway_ttft_seconds_count", mode=mode.name) == 1, "a replay is no second request"
        assert 0 < value("spolia_gateway_ttft_seconds_sum", mode=mode.name) < 5
        assert value("spolia_gateway_missed_tokens_total", tenant=TENANT, kind="PREFIX", reason="DIGEST") == 128
        assert value("spolia_gateway_prompt_tokens_total", tenant=TENANT, source="DEVICE") == 50


async def test_a_request_without_a_token_has_no_time_to_one(model: Path) -> None:
    async def refuses(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        raise InvalidRequest("not this one")
        yield finish(node.node_id, 0)

    async with world(model, decodes=[FakeDecode("a", refuses)]) as w:
        with pytest.raises(Exception, match="not this one"):
            await w.generate(text_request("the stones"))
        assert w.node.server.metrics.value("spolia_gateway_ttft_seconds_count", mode="EXACT") == 0
