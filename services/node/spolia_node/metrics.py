"""Counts and times, for Prometheus. Each node owns its registry, so several in one process do not mix."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TypeVar, cast

import grpc
from google.protobuf import descriptor_pool
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.metrics import MetricWrapperBase

from spolia_node.interceptor import service_of
from spolia_node.metrics_endpoint import MetricsEndpoint

SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""For calls and pieces of work. What a user waits for has buckets of its own, where it is measured."""

disable_created_metrics()  # type: ignore[no-untyped-call]  # upstream
# A second series for every count, which says when it began: a third more to scrape, and Prometheus ignores it.

M = TypeVar("M", bound=MetricWrapperBase)


class Metrics:
    """The metrics of one node. Asking for a name again gives the same metric; names start with `spolia_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._metrics: dict[str, MetricWrapperBase] = {}
        self._endpoint: MetricsEndpoint | None = None
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

    def begin_rpcs(self, services: Iterable[str]) -> None:
        """Makes every series of the calls that services, known by their full names, may get."""
        pool = descriptor_pool.Default()
        for service in services:
            for method in pool.FindServiceByName(service).methods:
                for code in grpc.StatusCode:
                    self._rpc(f"/{service}/{method.name}", code)

    def observe_rpc(self, method: str, code: grpc.StatusCode, seconds: float) -> None:
        """Counts one call that ended; fit for `ErrorInterceptor`."""
        num_calls, length = self._rpc(method, code)
        num_calls.inc()
        length.observe(seconds)

    def serve(self, host: str, port: int) -> int:
        """Starts the HTTP endpoint on a thread of its own; its port. Raises `OSError` when it cannot be bound."""
        self._endpoint = MetricsEndpoint(self.registry, host, port)
        ProcessCollector(registry=self.registry)
        return self._endpoint.port

    async def stop(self) -> None:
        """Ends the endpoint, if there is one. Idempotent."""
        if self._endpoint is not None:
            endpoint, self._endpoint = self._endpoint, None
            await asyncio.to_thread(endpoint.stop)

    def _rpc(self, method: str, code: grpc.StatusCode) -> tuple[Counter, Histogram]:
        children = self._children.get((method, code))
        if children is None:
            service, name = service_of(method), method.rpartition("/")[2]
            children = self._requests.labels(service, name, code.name), self._seconds.labels(service, name)
            self._children[method, code] = children
        return children

    def _metric(self, kind: type[M], name: str, meaning: str, labels: tuple[str, ...]) -> M:
        metric = self._metrics.get(name)
        if metric is None:
            metric = self._metrics[name] = kind(name, meaning, labels, registry=self.registry)
        return cast(M, metric)
