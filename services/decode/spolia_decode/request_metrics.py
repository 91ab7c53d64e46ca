"""Where the time of a request goes on its decode node."""

from __future__ import annotations

from spolia.v1.common_pb2 import Timings
from spolia_core.reuse import ReuseMode
from spolia_node.metrics import Metrics

BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 1.0, 1.5, 2.5, 4.0, 6.0, 10.0, 15.0, 25.0),
    *(40.0, 60.0, 120.0, 300.0, 600.0, 1800.0),
)


class RequestMetrics:
    """The parts of finished requests' times; every series is there from the start."""

    def __init__(self, metrics: Metrics) -> None:
        queue = metrics.histogram(
            "spolia_request_queue_time_seconds",
            "Arrival at the decode node to the start of work.",
            "mode",
            buckets=BUCKETS,
        )
        prefill = metrics.histogram(
            "spolia_request_prefill_time_seconds",
            "Start of work to the first token: KV fetched, computed, linked.",
            "mode",
            buckets=BUCKETS,
        )
        decode = metrics.histogram(
            "spolia_request_decode_time_seconds", "First token to the last.", "mode", buckets=BUCKETS
        )
        self._queue = {mode: queue.labels(mode.name.lower()) for mode in ReuseMode}
        self._prefill = {mode: prefill.labels(mode.name.lower()) for mode in ReuseMode}
        self._decode = {mode: decode.labels(mode.name.lower()) for mode in ReuseMode}

    def finished(self, mode: ReuseMode, timings: Timings) -> None:
        """A request came to its finish. One that had only to be ended, after a replay, has no times worth counting."""
        if not timings.ttft_ms:
            return
        self._queue[mode].observe(timings.queue_ms / 1000)
        self._prefill[mode].observe((timings.ttft_ms - timings.queue_ms) / 1000)
        self._decode[mode].observe((timings.e2e_ms - timings.ttft_ms) / 1000)
