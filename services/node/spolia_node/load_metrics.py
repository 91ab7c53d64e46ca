"""How busy a node is, for Prometheus: what it tells the directory, read when somebody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from spolia.v1.directory_pb2 import NodeLoad


class LoadCollector(Collector):
    """Register it with a node's registry. `make_load` is called from the endpoint's thread."""

    def __init__(self, role: str, make_load: Callable[[], NodeLoad]) -> None:
        self._role = role
        self._make_load = make_load

    def collect(self) -> Iterator[Metric]:
        """Requests of every node; the pool of one that has an engine."""
        load = self._make_load()
        yield self._of_role("spolia_num_requests_running", "Requests being worked on.", load.num_running)
        yield self._of_role("spolia_num_requests_waiting", "Requests waiting for their turn.", load.num_waiting)
        if load.total_blocks:
            yield self._of_role("spolia_queued_tokens", "Prompt tokens still to be prepared.", load.queued_tokens)
            yield GaugeMetricFamily(
                "spolia_kv_cache_usage_ratio",
                "Share of the pool that requests hold, 0 to 1: what is cached and may be dropped is not in it.",
                value=1 - load.available_blocks / load.total_blocks,
            )
            yield self._blocks(blocks_by_state(load))

    def _of_role(self, name: str, meaning: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, meaning, labels=["role"])
        family.add_metric([self._role], value)
        return family

    def _blocks(self, counts: Mapping[str, int]) -> Metric:
        family = GaugeMetricFamily("spolia_kv_cache_blocks", "Blocks of the pool by what they hold.", labels=["state"])
        for state, count in counts.items():
            family.add_metric([state], count)
        return family


def blocks_by_state(load: NodeLoad) -> dict[str, int]:
    """A pool's ledger: state to blocks."""
    return {
        "free": load.available_blocks - load.cached_blocks,
        "referenced": load.referenced_blocks,
        "cached": load.cached_blocks,
        "in_transfer": load.in_transfer_blocks,
        "lent": load.lent_blocks,
    }
