"""Spans: nothing where nobody traces, nested where somebody does, and never in anyone's way."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from spolia_core.errors import InvalidRequest, Unavailable
from spolia_node import tracing
from spolia_node.config import NodeConfig
from spolia_node.tracing import NO_SPAN, Tracing, current_span, span, span_across_yields, trace_metadata

METHOD = "/spolia.v1.GatewayService/Generate"
AWAY = "http://127.0.0.1:9"
"""Nobody listens there."""


class Recorded:
    """A node's spans, as they end."""

    def __init__(self, share: float = 1.0) -> None:
        self.tracing = Tracing(NodeConfig(tracing_endpoint=AWAY, tracing_share=share), "gateway")
        self.tracing.begin_at([METHOD])
        self._exporter = InMemorySpanExporter()
        provider = self.tracing._provider
        assert isinstance(provider, TracerProvider)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    def enter(self, *metadata: tuple[str, str | bytes]) -> Any:
        return self.tracing.enter(METHOD, metadata)

    def ended(self) -> dict[str, ReadableSpan]:
        return {each.name: each for each in self._exporter.get_finished_spans()}


def is_child(child: ReadableSpan, parent: ReadableSpan) -> bool:
    assert parent.context is not None
    return child.parent is not None and child.parent.span_id == parent.context.span_id


def test_without_an_endpoint_everything_is_one_object_that_does_nothing() -> None:
    tracing = Tracing(NodeConfig(), "decode")
    tracing.begin_at([METHOD])
    with tracing.enter(METHOD, [("traceparent", "00-" + "1" * 32 + "-" + "2" * 16 + "-01")]) as entered:
        assert entered is NO_SPAN
        assert span("fetch", num_tokens=1) is span_across_yields("decode") is current_span() is NO_SPAN
        assert trace_metadata() == ()
        with span("fetch") as fetch:
            fetch.set(num_bytes=1)
            fetch.event("cache.hit", source="host")
            fetch.fail("no")


class Empty:
    """What can be entered and told, and does nothing: so much Python itself takes here."""

    def __enter__(self) -> Empty:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def set(self, **attributes: object) -> None:
        return None


def test_what_nobody_traces_costs_less_than_two_microseconds() -> None:
    """Some twenty spans a request: 40 µs at the very most; on a slow machine four empty blocks."""
    empty = Empty()

    def least() -> None:
        with empty as nothing:
            nothing.set(num_bytes=1)

    def one() -> None:
        with span("fetch", num_tokens=1, kind="local") as fetch:
            fetch.set(num_bytes=1)

    ways = [(timed(one, 2000), timed(least, 2000)) for _ in range(20)]
    best_s, least_s = (min(times) for times in zip(*ways, strict=True))
    assert best_s < max(2e-6, 4 * least_s), f"{best_s * 1e6:.2f} µs, an empty block {least_s * 1e6:.2f} µs"


def timed(work: Any, times: int) -> float:
    began = time.thread_time()
    for _ in range(times):
        work()
    return (time.thread_time() - began) / times


async def test_spans_nest_through_tasks_and_threads_and_generators_do_not_hold_them() -> None:
    recorded = Recorded()

    async def deltas() -> AsyncIterator[int]:
        with span_across_yields("decode"):
            for number in range(2):
                yield number

    async def in_task() -> None:
        with span("task"):
            await asyncio.to_thread(lambda: span("thread").__enter__().__exit__(None, None, None))

    with recorded.enter():
        async for _ in deltas():
            with span("between"):
                pass
        await asyncio.create_task(in_task())
    assert current_span() is NO_SPAN
    spans = recorded.ended()
    root = spans["spolia.v1.GatewayService/Generate"]
    assert all(is_child(spans[name], root) for name in ("decode", "between", "task"))
    assert is_child(spans["thread"], spans["task"])


def test_a_trace_goes_on_over_the_wire() -> None:
    here, there = Recorded(), Recorded()
    with here.enter(), span("fetch"):
        carried = trace_metadata()
    assert [key for key, _ in carried] == ["traceparent"]
    with there.tracing.enter("/spolia.v1.KVStoreService/Get", carried):
        pass
    assert is_child(there.ended()["spolia.v1.KVStoreService/Get"], here.ended()["fetch"])


def test_only_named_calls_begin_a_trace() -> None:
    recorded = Recorded()
    assert recorded.tracing.enter("/grpc.health.v1.Health/Watch", [("x-request-id", "1")]) is NO_SPAN
    assert recorded.tracing.enter("/spolia.v1.GatewayService/GetCluster", []) is NO_SPAN
    with recorded.enter(("traceparent", "no trace context at all")):
        pass
    assert recorded.ended()["spolia.v1.GatewayService/Generate"].parent is None


def test_a_request_over_http_brings_its_trace_in_headers_or_begins_one() -> None:
    recorded, headers = Recorded(), [("traceparent", "00-" + "1" * 32 + "-" + "2" * 16 + "-01"), ("accept", "*/*")]
    with recorded.tracing.enter_http("POST", "/v1/completions", headers), span("tokenize"):
        pass
    with recorded.tracing.enter_http("POST", "/v1/chat/completions", []):
        pass
    spans = recorded.ended()
    brought, begun = spans["POST /v1/completions"], spans["POST /v1/chat/completions"]
    assert brought.parent is not None
    assert brought.parent.trace_id == int("1" * 32, 16)
    assert is_child(spans["tokenize"], brought)
    assert begun.parent is None
    assert Tracing(NodeConfig(), "gateway").enter_http("POST", "/v1/completions", headers) is NO_SPAN


def test_the_share_decides_of_requests_whose_client_has_not() -> None:
    none, asked = Recorded(share=0.0), ("traceparent", "00-" + "1" * 32 + "-" + "2" * 16 + "-01")
    with none.enter():
        pass
    assert none.ended() == {}
    with none.enter(asked):
        pass
    assert none.ended()


@pytest.mark.parametrize("is_parent", [True, False])
def test_errors_and_cancels_are_told_apart(is_parent: bool) -> None:
    recorded, begin = Recorded(), span if is_parent else span_across_yields

    def leave_with(name: str, error: BaseException) -> None:
        with pytest.raises(type(error)), begin(name):
            raise error

    with recorded.enter():
        leave_with("lost", Unavailable("node-1 is gone"))
        leave_with("cancelled", asyncio.CancelledError())
        with begin("well"):
            pass
        assert (current_span() is NO_SPAN) is False
    spans = recorded.ended()
    assert (spans["lost"].status.is_ok, spans["lost"].status.description) == (False, "Unavailable: node-1 is gone")
    assert dict(spans["cancelled"].attributes or {}) == {"spolia.cancelled": True}
    assert spans["well"].status.is_ok


async def test_a_collector_that_is_away_delays_no_call_and_no_end_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "EXPORT_TIMEOUT_S", 30.0)  # for as long one batch is tried
    monkeypatch.setattr(tracing, "FAREWELL_S", 0.5)
    recorded = Recorded()
    began = time.monotonic()
    for _ in range(500):
        with recorded.enter(), span("fetch"):
            pass
    assert time.monotonic() - began < 10.0, "no call waited for the collector"
    began = time.monotonic()
    await recorded.tracing.stop()
    assert time.monotonic() - began < 10.0, "and the end no longer than it is to"
    assert recorded.enter() is NO_SPAN
    await recorded.tracing.stop()


def test_a_missing_extra_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(InvalidRequest, match=r"spolia\[tracing\]") as refused:
        Tracing(NodeConfig(tracing_endpoint=AWAY), "decode")
    assert refused.value.field == "tracing_endpoint"


def test_an_endpoint_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest) as refused:
        NodeConfig(tracing_endpoint="collector:4317")
    assert refused.value.field == "tracing_endpoint"
