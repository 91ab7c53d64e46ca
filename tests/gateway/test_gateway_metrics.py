"""What a gateway counts: every name from the first moment, and what reuse reports add up to."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from gateway_fakes import FakeDecode, answers, fails_after, finish
from gateway_worlds import text_request, world

from spolia.v1 import common_pb2
from spolia.v1.directory_pb2 import ServingFigures
from spolia_core.errors import InvalidRequest
from spolia_core.reuse import ChunkKind, MissReason, ReuseMode, TokenSource
from spolia_gateway.latency import Latencies
from spolia_gateway.metrics import PLANES, SOURCES, GatewayMetrics
from spolia_gateway.recent import SLOT_S, WINDOW_S, RecentServing
from spolia_node.metrics import Metrics

TENANT = "museum"
COMPUTED = ("computed", "link", "compiled")


def report(**fields: Any) -> common_pb2.Finish:
    reason = common_pb2.FINISH_REASON_LENGTH
    return common_pb2.Finish(reason=reason, reuse=common_pb2.ReuseReport(mode=common_pb2.REUSE_MODE_LINKED, **fields))


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
        if sample.name.startswith("spolia_") and not sample.name.startswith("spolia_rpc_")
    }


def test_every_series_is_there_before_the_first_request() -> None:
    metrics = Metrics()
    gateway = GatewayMetrics(metrics, TENANT)
    before = series(metrics)
    gateway.count_finish(TENANT, ReuseMode.LINKED, KNOWN)
    gateway.count_tokens(TENANT, 1)
    gateway.count_replay(TENANT)
    request = gateway.request_arrived()
    request.passed_on(1, ReuseMode.EXACT)
    request.passed_on(1, ReuseMode.EXACT)
    request.finished(ReuseMode.EXACT)
    assert series(metrics) == before
    count = metrics.registry.get_sample_value
    for kind in ChunkKind:
        for reason in MissReason:
            labels = {"tenant": TENANT, "kind": kind.name.lower(), "reason": reason.name.lower()}
            assert count("spolia_cache_misses_total", labels) is not None, labels
            assert count("spolia_cache_missed_tokens_total", labels) is not None, labels
    for source in SOURCES.values():
        name = "spolia_computed_tokens_total" if source in COMPUTED else "spolia_cached_tokens_total"
        assert count(name, {"tenant": TENANT, "source": source}) is not None


def test_the_names_are_those_of_the_contract() -> None:
    for core, contract, prefix in (
        (TokenSource, common_pb2.TokenSource, "TOKEN_SOURCE_"),
        (ChunkKind, common_pb2.ChunkKind, "CHUNK_KIND_"),
        (MissReason, common_pb2.MissReason, "MISS_REASON_"),
    ):
        named = {member.value: member.name for member in core}  # type: ignore[attr-defined]  # each an IntEnum
        assert named == {number: name.removeprefix(prefix) for name, number in contract.items() if number}
    planes = {
        number: name.removeprefix("DATA_PLANE_").lower() for name, number in common_pb2.DataPlane.items() if number
    }
    assert planes == PLANES


def test_a_report_adds_to_tokens_misses_and_bytes() -> None:
    metrics = Metrics()
    gateway = GatewayMetrics(metrics, TENANT)
    for _ in range(2):
        gateway.count_finish(TENANT, ReuseMode.LINKED, KNOWN)
    value = metrics.value
    cached = {s: value("spolia_cached_tokens_total", tenant=TENANT, source=s) for s in SOURCES.values()}
    computed = {s: value("spolia_computed_tokens_total", tenant=TENANT, source=s) for s in SOURCES.values()}
    assert {source: count for source, count in cached.items() if count} == {"device": 100, "host": 60}
    assert {source: count for source, count in computed.items() if count} == {"computed": 40}
    assert value("spolia_prompt_tokens_total", tenant=TENANT) == 200, "the hit rate is 80 %"
    figures = gateway.recent.figures()
    assert (figures.num_requests, figures.num_prompt_tokens, figures.num_cached_tokens) == (2, 200, 160)
    not_found = {"tenant": TENANT, "kind": "local", "reason": "not_found"}
    assert value("spolia_cache_misses_total", **not_found) == 4
    assert value("spolia_cache_missed_tokens_total", **not_found) == 200
    damaged = {"tenant": TENANT, "kind": "prefix", "reason": "digest"}
    assert value("spolia_cache_misses_total", **damaged) == 2
    assert value("spolia_cache_missed_tokens_total", **damaged) == 256
    moved = {
        (kind, plane): value("spolia_kv_transfer_bytes_total", tenant=TENANT, kind=kind, plane=plane)
        for kind in ("chunk", "live", "inline")
        for plane in ("grpc", "nixl")
    }
    assert {key: count for key, count in moved.items() if count} == {
        ("chunk", "grpc"): 14,
        ("live", "grpc"): 10,
        ("inline", "grpc"): 6,
        ("chunk", "nixl"): 22,
    }


def test_what_a_newer_node_says_is_counted_under_its_number() -> None:
    newer = report(misses=[miss(9, 99, 12), miss(1, 99, 3)])
    newer.reuse.sources.add(num_tokens=8).source = 77  # type: ignore[assignment]  # any number may come over the wire
    newer.reuse.transfers.add(live_bytes=6).plane = 55  # type: ignore[assignment]  # a number no release knows
    received = common_pb2.Finish.FromString(newer.SerializeToString())
    metrics = Metrics()
    GatewayMetrics(metrics, TENANT).count_finish(TENANT, ReuseMode.EXACT, received)
    value = metrics.value
    assert value("spolia_cache_missed_tokens_total", tenant=TENANT, kind="unknown_9", reason="unknown_99") == 12
    assert value("spolia_cache_misses_total", tenant=TENANT, kind="local", reason="unknown_99") == 1
    assert value("spolia_computed_tokens_total", tenant=TENANT, source="unknown_77") == 8
    assert value("spolia_prompt_tokens_total", tenant=TENANT) == 8
    assert value("spolia_kv_transfer_bytes_total", tenant=TENANT, kind="live", plane="unknown_55") == 6


def test_times_are_taken_of_each_sample_and_by_mode() -> None:
    metrics, times = Metrics(), iter([10.0, 10.75, 11.0, 11.5, 12.5, 13.0])
    latencies = Latencies(metrics, RecentServing())
    request = latencies.request_arrived(lambda: next(times))
    request.passed_on(0, ReuseMode.LINKED)  # text that was held back, without a token
    request.passed_on(1, ReuseMode.LINKED, 0)
    request.passed_on(1, ReuseMode.LINKED, 1)  # another sample's first: no gap, and no second first token
    request.passed_on(1, ReuseMode.LINKED, 0)
    request.passed_on(3, ReuseMode.LINKED, 1)  # together: each took its share
    request.finished(ReuseMode.LINKED)
    value = metrics.value
    assert value("spolia_time_to_first_token_seconds_sum", mode="linked") == 0.75
    assert value("spolia_time_to_first_token_seconds_count", mode="linked") == 1
    assert value("spolia_inter_token_latency_seconds_sum", mode="linked") == pytest.approx(0.75 + 1.5)
    assert value("spolia_inter_token_latency_seconds_count", mode="linked") == 4
    assert value("spolia_e2e_request_latency_seconds_sum", mode="linked") == 3.0
    assert value("spolia_e2e_request_latency_seconds_count", mode="exact") == 0


@pytest.mark.parametrize("together", [(1, 1, 1, 1), (2, 2), (4,), (1, 3), (3, 1)])
def test_a_sample_has_a_gap_fewer_than_tokens_however_they_come(together: tuple[int, ...]) -> None:
    metrics, clock = Metrics(), itertools.count(10)
    request = Latencies(metrics, RecentServing()).request_arrived(lambda: next(clock))
    for num_tokens in together:
        request.passed_on(num_tokens, ReuseMode.EXACT)
    name = "spolia_inter_token_latency_seconds"
    assert metrics.value(f"{name}_count", mode="exact") == 3
    assert metrics.value(f"{name}_sum", mode="exact") == pytest.approx(len(together) - 1), "and no time is lost"
    assert metrics.value("spolia_time_to_first_token_seconds_count", mode="exact") == 1


def test_recent_figures_forget_after_the_window() -> None:
    now = 100.0
    recent = RecentServing(lambda: now)
    for milliseconds in range(1, 101):
        recent.first_token(milliseconds / 1000)
        recent.next_token(milliseconds / 1e4)
    recent.finished(100, 80, 7)
    figures = recent.figures()
    assert (figures.num_requests, figures.num_prompt_tokens, figures.num_cached_tokens) == (1, 100, 80)
    assert (figures.num_generated_tokens, figures.window_s) == (7, 1), "it has just begun"
    assert (figures.ttft_p50_ms, figures.ttft_p95_ms) == (51.0, 96.0)
    assert (figures.itl_p50_ms, figures.itl_p95_ms) == (5.1, 9.6)
    now += WINDOW_S - SLOT_S
    recent.finished(10, 0, 1)
    assert recent.figures().num_requests == 2
    now += SLOT_S
    figures = recent.figures()
    assert (figures.num_requests, figures.num_prompt_tokens, figures.ttft_p50_ms) == (1, 10, 0.0)
    now += WINDOW_S
    assert recent.figures() == ServingFigures(window_s=WINDOW_S)


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
        assert value("spolia_time_to_first_token_seconds_count", mode=mode.name.lower()) == 1, (
            "a replay is no second request"
        )
        assert 0 < value("spolia_time_to_first_token_seconds_sum", mode=mode.name.lower()) < 5
        assert value("spolia_cache_missed_tokens_total", tenant=TENANT, kind="prefix", reason="digest") == 128
        assert value("spolia_cached_tokens_total", tenant=TENANT, source="device") == 50


async def test_a_request_without_a_token_has_no_time_to_one(model: Path) -> None:
    async def refuses(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        raise InvalidRequest("not this one")
        yield finish(node.node_id, 0)

    async with world(model, decodes=[FakeDecode("a", refuses)]) as w:
        with pytest.raises(Exception, match="not this one"):
            await w.generate(text_request("the stones"))
        assert w.node.server.metrics.value("spolia_time_to_first_token_seconds_count", mode="EXACT") == 0
