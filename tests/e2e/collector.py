"""An OTLP collector on a free port that keeps what it is sent, and the spans of it put into trees."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc
from opentelemetry.proto.trace.v1 import trace_pb2


@dataclass(frozen=True)
class CollectedSpan:
    """A span, and the service that exported it."""

    service: str
    node_id: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]]
    is_error: bool
    message: str


@dataclass
class Collector(pb_grpc.TraceServiceServicer):
    """Every span it was sent."""

    endpoint: str = ""
    spans: list[CollectedSpan] = field(default_factory=list)

    async def Export(self, request: pb.ExportTraceServiceRequest, context: Any) -> pb.ExportTraceServiceResponse:
        for resource_spans in request.resource_spans:
            resource = _plain(resource_spans.resource.attributes)
            for scope_spans in resource_spans.scope_spans:
                self.spans += [_span(resource, span) for span in scope_spans.spans]
        return pb.ExportTraceServiceResponse()

    def named(self, name: str, service: str = "") -> list[CollectedSpan]:
        return [span for span in self.spans if span.name == name and service in ("", span.service)]

    def one(self, name: str, service: str = "") -> CollectedSpan:
        found = self.named(name, service)
        assert len(found) == 1, (name, service, self.drawn())
        return found[0]

    def parent(self, span: CollectedSpan) -> CollectedSpan:
        return next(other for other in self.spans if other.span_id == span.parent_id)

    def path(self, span: CollectedSpan) -> list[str]:
        """Names from the root to a span, services before the names of calls they answered."""
        by_id = {each.span_id: each for each in self.spans}
        names: list[str] = []
        at: CollectedSpan | None = span
        while at is not None:
            names.insert(0, at.name.rpartition(".")[2])
            at = by_id.get(at.parent_id)
        return names

    def drawn(self) -> str:
        """For people who look at a test that failed."""
        return "\n" + "\n".join(sorted(" > ".join([*self.path(s), s.service]) for s in self.spans))


@asynccontextmanager
async def a_collector() -> AsyncIterator[Collector]:
    server = grpc.aio.server()
    collector = Collector()
    pb_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield collector
    finally:
        await server.stop(None)


def _span(resource: dict[str, Any], span: trace_pb2.Span) -> CollectedSpan:
    return CollectedSpan(
        service=resource["service.name"],
        node_id=resource["service.instance.id"],
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_plain(span.attributes),
        events=[(event.name, _plain(event.attributes)) for event in span.events],
        is_error=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        message=span.status.message,
    )


def _plain(attributes: Any) -> dict[str, Any]:
    return {
        each.key.removeprefix("spolia."): getattr(each.value, each.value.WhichOneof("value")) for each in attributes
    }
