"""The SDK makes its requests part of the caller's trace, and knows nothing of traces where the caller does not."""

from __future__ import annotations

import subprocess
import sys

from fake_gateway import Call, FakeGateway
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider


def test_a_call_inside_a_span_carries_it(call: Call, gateway: FakeGateway) -> None:
    tracer = TracerProvider().get_tracer("a caller")
    with tracer.start_as_current_span("answer a user") as span:
        call("generate", "Hi")
    its = span.get_span_context()
    expected = f"00-{its.trace_id:032x}-{its.span_id:016x}-{its.trace_flags:02x}"
    assert gateway.metadata["traceparent"] == expected


def test_a_call_outside_one_carries_none(call: Call, gateway: FakeGateway) -> None:
    assert not trace.get_current_span().get_span_context().is_valid
    call("generate", "Hi")
    assert "traceparent" not in gateway.metadata


def test_the_sdk_imports_no_tracing() -> None:
    said = "import spolia, sys; from spolia.trace_context import trace_metadata; assert trace_metadata() == (); "
    said += "assert not any(name.startswith('opentelemetry') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", said], check=True, timeout=60)
