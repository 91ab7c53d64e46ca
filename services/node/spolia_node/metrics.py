"""Counts and times, for Prometheus. Each node owns its registry, so several in one process do not mix."""

from __future__ import annotations

import asyncio
import threading
from typing import TypeVar, cast
from wsgiref.simple_server import WSGIServer

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server
from prometheus_client.metrics import MetricWrapperBase

from spolia_node.interceptor import service_of

SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

M = TypeVar("M", bound=MetricWrapperBase)


class Metrics:
    """The metrics of one node. Asking for a name again gives the same metric; names start with `spolia_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._metrics: dict[str, MetricWrapperBase] = {}
        self._endpoint: tuple[WSGIServer, threading.Thread] | None = None
        self._requests = self.counter("spolia_rpc_requests_total", "Calls that ended.", "service", "method", "code")
        self._seconds = self.histogram(
            "spolia_rpc_seconds", "Length of calls, streams to their end.", "service", "method"
        )
        self._children: dict[tuple[str, grpc.StatusCode], tuple[Counter, Histogram]] = {}

    def counter(self, name: str, meaning: str, *labels: str) -> Counter:
        """A count that only grows; its name ends in `_total`."""
        return self._metric(Counter, name, meaning, labels)

    def gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        """A value that goes up and down."""
        return self._metric(Gauge, name, meaning, labels)

    def histogram(
        self, name: str, meaning: str, *labels: str, buckets: tuple[float, ...] = SECONDS_BUCKETS
    ) -> Histogram:
        """A distribution; the default buckets are for seconds."""
        metric = self._metrics.get(name)
        if metric is None:
            metric = self._metrics[name] = Histogram(name, meaning, labels, registry=self.registry, buckets=buckets)
        return cast(Histogram, metric)

    def value(self, name: str, **labels: str) -> float:
        """What a sample stands at now, 0 when it was never touched. For tests and reports."""
        return self.registry.get_sample_value(name, labels) or 0.0

    def observe_rpc(self, method: str, code: grpc.StatusCode, seconds: float) -> None:
        """Counts one call that ended; fit for `ErrorInterceptor`."""
        children = self._children.get((method, code))
        if children is None:
            service, name = service_of(method), method.rpartition("/")[2]
            children = self._requests.labels(service, name, code.name), self._seconds.labels(service, name)
            self._children[method, code] = children
        children[0].inc()
        children[1].observe(seconds)

    def serve(self, host: str, port: int) -> int:
        """Starts the HTTP endpoint on a thread of its own; its port. Raises `OSError` when it cannot be bound."""
        ProcessCollector(registry=self.registry)
        self._endpoint = start_http_server(port, host, self.registry)
        return self._endpoint[0].server_port

    async def stop(self) -> None:
        """Ends the endpoint, if there is one. Idempotent."""
        if self._endpoint is not None:
            (server, thread), self._endpoint = self._endpoint, None
            await asyncio.to_thread(server.shutdown)
            server.server_close()
            await asyncio.to_thread(thread.join)

    def _metric(self, kind: type[M], name: str, meaning: str, labels: tuple[str, ...]) -> M:
        metric = self._metrics.get(name)
        if metric is None:
            metric = self._metrics[name] = kind(name, meaning, labels, registry=self.registry)
        return cast(M, metric)
