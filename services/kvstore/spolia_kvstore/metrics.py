"""The store's counts for Prometheus, read when they are asked for. Names end in their unit: seconds, bytes, totals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from spolia_core.reuse import MissReason
from spolia_kvstore.objects import Tier
from spolia_kvstore.store import KVStore

Sample = tuple[tuple[str, ...], float]


class StoreCollector(Collector):
    """Register it with a `CollectorRegistry`. Runs on the endpoint's thread: reads numbers only, changes nothing.

    Every name and label is there before the first request.
    """

    def __init__(self, store: KVStore) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        """One family for each count."""
        yield from self._gauges()
        yield from self._tier_gauges()
        yield from self._counters()
        yield from self._tenants()

    def _gauges(self) -> Iterator[Metric]:
        store, ram = self._store, self._store.tiers.ram
        for name, meaning, value in (
            ("objects", "Objects that can be found, each counted once.", store.num_objects),
            (
                "held_bytes",
                "Bytes charged to the memory budget, uploads and reads of dropped ones too.",
                ram.held_bytes,
            ),
            ("transfers", "Uploads and reads under way.", store.tiers.num_transfers),
            ("pins", "Live pins.", store.pins.num_live),
            ("claims", "Live claims granted here.", store.claims.num_live()),
            ("claim_waiters", "Waits for another's claim, counted per chunk.", store.claims.num_waiters),
            ("backend_reachable", "1 while the index shared by stores answers.", store.backend.reachable),
            ("disk_healthy", "1 unless the last write to disk failed.", self._disk_is_healthy()),
        ):
            yield GaugeMetricFamily(f"spolia_store_{name}", meaning, value=value)

    def _tier_gauges(self) -> Iterator[Metric]:
        ram, disk, gate = self._store.tiers.ram, self._store.tiers.disk, self._store.tiers.gate
        on_disk = (len(disk), disk.used_bytes, disk.budget_bytes) if disk is not None else (0, 0, 0)
        numbers = {Tier.RAM: (len(ram), ram.resident_bytes, ram.budget_bytes), Tier.DISK: on_disk}
        for index, (name, meaning) in enumerate(
            (
                ("tier_objects", "Copies on a tier."),
                ("tier_bytes", "Bytes of the copies on a tier."),
                ("tier_budget_bytes", "Byte budget of a tier."),
            )
        ):
            yield _gauge(name, meaning, ["tier"], [((_name(tier),), numbers[tier][index]) for tier in Tier])
        seconds = [((_name(tier),), gate.speeds[tier].seconds_per_byte) for tier in Tier]
        yield _gauge(
            "read_seconds_per_byte", "Measured cost of reading a tier; 0 before the first read.", ["tier"], seconds
        )

    def _counters(self) -> Iterator[Metric]:
        store, ram = self._store, self._store.tiers.counters
        counters, disk = store.counters, store.tiers.disk
        evictions = (disk.counters.evictions, disk.counters.evicted_bytes) if disk is not None else (0, 0)
        by_tier = [((_name(tier),), counters.hits[tier]) for tier in Tier]
        yield _counter("hits", "Chunks found by Get.", ["tier"], by_tier)
        misses = [((reason.name.lower(),), counters.misses[reason]) for reason in MissReason]
        yield _counter("misses", "Chunks not given by Get, by reason.", ["reason"], misses)
        read = [((_name(tier),), counters.read_bytes[tier]) for tier in Tier]
        yield _counter("read_bytes", "Bytes of the objects found by Get.", ["tier"], read)
        evicted = {Tier.RAM: (ram.evictions, ram.evicted_bytes), Tier.DISK: evictions}
        yield _counter("evictions", "Copies evicted.", ["tier"], [((_name(t),), evicted[t][0]) for t in Tier])
        yield _counter("evicted_bytes", "Bytes evicted.", ["tier"], [((_name(t),), evicted[t][1]) for t in Tier])
        for name, meaning, value in (
            ("lost_evictions", "Objects evicted from memory that no file held.", ram.lost),
            ("digest_failures", "Objects or frames whose digest did not match.", counters.digest_failures),
            ("puts", "Objects stored.", counters.puts),
            (
                "quarantined",
                "Objects on disk taken out of service.",
                disk.counters.quarantined if disk is not None else 0,
            ),
            ("written_bytes", "Bytes written to disk.", disk.counters.written_bytes if disk is not None else 0),
            ("write_seconds", "Time spent writing to disk.", disk.counters.write_seconds if disk is not None else 0),
        ):
            yield _counter(name, meaning, [], [((), value)])
        errors = (
            ("read", disk.counters.read_errors if disk is not None else 0),
            ("write", disk.counters.write_errors if disk is not None else 0),
            ("index", disk.rows.errors if disk is not None else 0),
        )
        yield _counter(
            "disk_errors", "Operations on the disk that failed.", ["operation"], [((n,), v) for n, v in errors]
        )

    def _tenants(self) -> Iterator[Metric]:
        held = sorted(self._store.tenants.held().items())
        by_bytes = [((tenant,), totals.num_bytes) for tenant, totals in held]
        yield _gauge("tenant_bytes", "Bytes of a tenant's objects, each counted once.", ["tenant"], by_bytes)
        by_objects = [((tenant,), totals.num_objects) for tenant, totals in held]
        yield _gauge("tenant_objects", "A tenant's objects, each counted once.", ["tenant"], by_objects)

    def _disk_is_healthy(self) -> bool:
        disk = self._store.tiers.disk
        return disk is None or disk.healthy


def _gauge(name: str, meaning: str, labels: list[str], samples: Iterable[Sample]) -> Metric:
    family = GaugeMetricFamily(f"spolia_store_{name}", meaning, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _counter(name: str, meaning: str, labels: list[str], samples: Iterable[Sample]) -> Metric:
    family = CounterMetricFamily(f"spolia_store_{name}", meaning, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _name(tier: Tier) -> str:
    return tier.name.lower()
