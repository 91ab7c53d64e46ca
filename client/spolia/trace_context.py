"""The caller's trace, where it has one: so that a request is part of it.

OpenTelemetry is no dependency: where the calling program has not imported it, there is no trace to go on with.
"""

from __future__ import annotations

import sys

W3C_KEYS = ("traceparent", "tracestate")


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """W3C trace context of the span around the caller, as metadata; empty where there is none."""
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return tuple((key, carrier[key]) for key in W3C_KEYS if key in carrier)
