"""What a client waits for, measured where its tokens are passed on."""

from __future__ import annotations

import time
from collections.abc import Callable

from spolia_core.reuse import ReuseMode
from spolia_gateway.recent import RecentServing
from spolia_node.metrics import Metrics

FIRST_TOKEN_BUCKETS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 1.0, 1.5, 2.5, 4.0, 6.0, 10.0, 15.0, 25.0, 40.0, 60.0),
    *(120.0, 300.0),
)
INTER_TOKEN_BUCKETS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5),
    *(5.0, 10.0),
)
REQUEST_BUCKETS = (
    *(0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.5, 4.0, 6.0, 10.0, 15.0, 25.0, 40.0, 60.0, 100.0, 150.0, 250.0, 400.0, 600.0),
    *(1200.0, 3600.0),
)


class Latencies:
    """The histograms. Every series is there from the start."""

    def __init__(self, metrics: Metrics, recent: RecentServing) -> None:
        first = metrics.histogram(
            "spolia_time_to_first_token_seconds",
            "Arrival of a request to its first token passed on, tokenizing and queueing included.",
            "mode",
            buckets=FIRST_TOKEN_BUCKETS,
        )
        between = metrics.histogram(
            "spolia_inter_token_latency_seconds",
            "Gap between two tokens of a sample as they are passed on; tokens that come together share one.",
            "mode",
            buckets=INTER_TOKEN_BUCKETS,
        )
        whole = metrics.histogram(
            "spolia_e2e_request_latency_seconds",
            "Arrival of a request to its finish passed on.",
            "mode",
            buckets=REQUEST_BUCKETS,
        )
        self.first_token = {mode: first.labels(mode.name.lower()) for mode in ReuseMode}
        self.inter_token = {mode: between.labels(mode.name.lower()) for mode in ReuseMode}
        self.request = {mode: whole.labels(mode.name.lower()) for mode in ReuseMode}
        self.recent = recent

    def request_arrived(self, now: Callable[[], float] = time.monotonic) -> RequestLatency:
        """Measures a request from now on."""
        return RequestLatency(self, now)


class RequestLatency:
    """The times of one request."""

    def __init__(self, latencies: Latencies, now: Callable[[], float]) -> None:
        self._latencies = latencies
        self._now = now
        self._arrived_s = now()
        self._last_s: dict[int, float] = {}
        """When a sample's last tokens were passed on, by its index."""

    @property
    def seconds(self) -> float:
        """Since the arrival."""
        return self._now() - self._arrived_s

    def passed_on(self, num_tokens: int, mode: ReuseMode, sample_index: int = 0) -> None:
        """Tokens of a sample go to the client. Text without a new token is none.

        A sample has one gap fewer than tokens, however they are put together: those that come first, and at once,
        have none between them.
        """
        if not num_tokens:
            return
        now = self._now()
        last, is_first = self._last_s.get(sample_index), not self._last_s
        self._last_s[sample_index] = now
        if is_first:
            self._latencies.first_token[mode].observe(now - self._arrived_s)
            self._latencies.recent.first_token(now - self._arrived_s)
        num_gaps, waited = (num_tokens - 1, 0.0) if last is None else (num_tokens, now - last)
        for _ in range(num_gaps):
            self._latencies.inter_token[mode].observe(waited / num_gaps)
            self._latencies.recent.next_token(waited / num_gaps)

    def finished(self, mode: ReuseMode) -> None:
        """The finish goes to the client."""
        self._latencies.request[mode].observe(self.seconds)
