"""Traces of requests across nodes, for those who collect them: OpenTelemetry behind three functions.

    gateway ── metadata: traceparent ──▶ decode ──▶ prefill, kvstore       every node exports its own spans

A trace begins with the client, whose W3C trace context comes in the call's metadata, else at a gateway. A node goes on
with a trace that a call brings, and begins none of its own. Inside a call, `span` is the child of the span around it,
which the event loop's context carries into tasks and threads. Where nothing is traced, `span` gives an object that does
nothing, and OpenTelemetry is never imported.

Spans hold ids, counts, bytes and times; never text or token ids.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection, Iterable, Mapping
from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc

from spolia.version import __version__
from spolia_core.errors import InvalidRequest, SpoliaError
from spolia_node.config import NodeConfig

if TYPE_CHECKING:
    from opentelemetry import trace as otel
    from opentelemetry.sdk.trace import TracerProvider

PARENT_KEY = "traceparent"
STATE_KEY = "tracestate"
EXPORT_TIMEOUT_S = 5.0
"""How long a collector may take to answer."""

FAREWELL_S = 2.0
"""How long a node that ends waits until its last spans are exported."""

Attribute = str | bool | int | float
Metadata = Iterable[tuple[str, str | bytes]]


class Span:
    """A piece of a request's work, from its making to the end of its `with` block. This one does nothing."""

    __slots__ = ()

    def set(self, **attributes: Attribute) -> None:
        """Says more of the work; names are exported as `spolia.NAME`."""

    def event(self, name: str, **attributes: Attribute) -> None:
        """Says that something happened now."""

    def fail(self, reason: str) -> None:
        """Says that it came to nothing. What leaves the block as an exception says so itself."""

    def __enter__(self) -> Span:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


NO_SPAN = Span()

_current: ContextVar[_RecordedSpan | None] = ContextVar("spolia_span", default=None)


def span(name: str, **attributes: Attribute) -> Span:
    """A piece of the work under way, begun now; its `with` block must hold no `yield`."""
    parent = _current.get()
    return NO_SPAN if parent is None else parent.child(name, attributes, is_parent=True)


def span_across_yields(name: str, **attributes: Attribute) -> Span:
    """As `span`, for generators: what is begun inside the block is not its child, but its parent's."""
    parent = _current.get()
    return NO_SPAN if parent is None else parent.child(name, attributes, is_parent=False)


def current_span() -> Span:
    """The span around this place."""
    return _current.get() or NO_SPAN


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """What a call to another node carries, so that its spans are children of the one around this place."""
    around = _current.get()
    return () if around is None else around.metadata()


class Tracing:
    """One node's spans, exported to the collector that its settings name; nothing where they name none.

    Raises `InvalidRequest`, naming the setting, where what it needs is not installed.
    """

    def __init__(self, config: NodeConfig, role: str) -> None:
        self._provider = _provider(config, role) if config.tracing_endpoint else None
        self._tracer = None if self._provider is None else self._provider.get_tracer("spolia", __version__)
        self._beginnings: frozenset[str] = frozenset()

    def begin_at(self, methods: Collection[str]) -> None:
        """Has traces begin at calls of these methods, "/package.Service/Method", that bring none."""
        self._beginnings = frozenset(methods)

    def enter(self, method: str, metadata: Metadata) -> Span:
        """A span for a call that arrived; `metadata` may hold its parent."""
        if self._tracer is None:
            return NO_SPAN
        carrier = _carrier(metadata)
        if not carrier and method not in self._beginnings:
            return NO_SPAN
        service, _, name = method.strip("/").rpartition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
        return _entered(self._tracer, method.strip("/"), carrier, attributes)

    def enter_http(self, method: str, route: str, headers: Metadata) -> Span:
        """A span for a request over HTTP, with names of headers in lower case; each begins a trace or brings one."""
        if self._tracer is None:
            return NO_SPAN
        attributes = {"http.request.method": method, "http.route": route}
        return _entered(self._tracer, f"{method} {route}", _carrier(headers), attributes)

    async def stop(self) -> None:
        """Exports what is left, for a short while. Idempotent."""
        provider, self._provider, self._tracer = self._provider, None, None
        if provider is not None:
            # A thread of its own, which keeps no process alive: a collector that is away is waited for no longer.
            last = threading.Thread(target=provider.shutdown, name="last-spans", daemon=True)
            last.start()
            await asyncio.to_thread(last.join, FAREWELL_S)


class _RecordedSpan(Span):
    """A span that is exported when it ends."""

    __slots__ = ("_is_parent", "_span", "_token", "_tracer")

    def __init__(self, tracer: otel.Tracer, recorded: otel.Span, *, is_parent: bool) -> None:
        self._tracer = tracer
        self._span = recorded
        self._is_parent = is_parent
        self._token: Token[_RecordedSpan | None] | None = None

    def child(self, name: str, attributes: Mapping[str, Attribute], *, is_parent: bool) -> Span:
        """One inside this one."""
        from opentelemetry import trace as otel  # there, or nothing would be recorded

        begun = self._tracer.start_span(
            name, context=otel.set_span_in_context(self._span), attributes=_named(attributes), record_exception=False
        )
        return _RecordedSpan(self._tracer, begun, is_parent=is_parent)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """This span as W3C trace context."""
        from opentelemetry import trace as otel
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, otel.set_span_in_context(self._span))
        return tuple(carrier.items())

    def set(self, **attributes: Attribute) -> None:
        self._span.set_attributes(_named(attributes))

    def event(self, name: str, **attributes: Attribute) -> None:
        self._span.add_event(name, _named(attributes))

    def fail(self, reason: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        self._span.set_status(Status(StatusCode.ERROR, reason))

    def __enter__(self) -> Span:
        if self._is_parent:
            self._token = _current.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            _current.reset(self._token)
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            self.set(cancelled=True)
        elif error is not None and not isinstance(error, grpc.aio.AbortError):  # of which the call's status tells
            self.fail(f"{type(error).__name__}: {error.message}" if isinstance(error, SpoliaError) else repr(error))
        self._span.end()


def _carrier(metadata: Metadata) -> dict[str, str]:
    return {key: str(value) for key, value in metadata if key in (PARENT_KEY, STATE_KEY)}


def _entered(tracer: otel.Tracer, name: str, carrier: Mapping[str, str], attributes: Mapping[str, Attribute]) -> Span:
    from opentelemetry import context, trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    begun = tracer.start_span(
        name,
        # Of what the call brought and of nothing else: no context of this thread's is its parent.
        context=TraceContextTextMapPropagator().extract(carrier, context.Context()),
        kind=trace.SpanKind.SERVER,
        attributes=attributes,
        record_exception=False,
    )
    return _RecordedSpan(tracer, begun, is_parent=True)


def _provider(config: NodeConfig, role: str) -> TracerProvider:
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ModuleNotFoundError as error:
        raise InvalidRequest(
            f"tracing_endpoint needs {error.name}, which is not installed; try: pip install 'spolia[tracing]'",
            field="tracing_endpoint",
            actual=config.tracing_endpoint,
        ) from error
    resource = Resource.create(
        {
            "service.namespace": "spolia",
            "service.name": f"spolia-{role}",
            "service.instance.id": config.node_id,
            "service.version": __version__,
        }
    )
    sampler = ParentBased(TraceIdRatioBased(config.tracing_share))
    provider = TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=config.tracing_endpoint, timeout=EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _named(attributes: Mapping[str, Attribute]) -> dict[str, Any]:
    return {f"spolia.{name}": value for name, value in attributes.items()}
