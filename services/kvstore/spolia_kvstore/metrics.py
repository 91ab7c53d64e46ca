"""The store's counts for Prometheus, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from spolia_kvstore.store import KVStore


class StoreCollector(Collector):
    """Register it with a `CollectorRegistry`. Runs on the endpoint's thread: reads whole numbers only."""

    def __init__(self, store: KVStore) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        """One family for each count."""
        objects, counters = self._store.objects, self._store.counters
        for name, meaning, value in (
            ("objects", "Objects that can be found.", len(objects)),
            ("resident_bytes", "Bytes of objects that can be found.", objects.resident_bytes),
            (
                "held_bytes",
                "Bytes charged to the budget, uploads and reads of dropped objects included.",
                objects.held_bytes,
            ),
            ("budget_bytes", "Byte budget of the RAM tier.", objects.budget_bytes),
            ("transfers", "Uploads and reads under way.", objects.num_transfers),
        ):
            yield GaugeMetricFamily(f"spolia_store_{name}", meaning, value=value)
        for name, meaning, value in (
            ("hits", "Chunks found by Get.", counters.hits),
            ("misses", "Chunks not found by Get.", counters.misses),
            ("evictions", "Objects evicted to make room.", counters.evictions),
            ("digest_failures", "Objects or frames whose digest did not match.", counters.digest_failures),
            ("puts", "Objects stored.", counters.puts),
        ):
            yield CounterMetricFamily(f"spolia_store_{name}", meaning, value=value)
