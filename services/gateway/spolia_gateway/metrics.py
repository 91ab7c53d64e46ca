"""What a gateway counts, most of it per tenant."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from enum import Enum
from itertools import product

from prometheus_client import Histogram

from spolia.v1 import common_pb2
from spolia_core.reuse import ChunkKind, MissReason, ReuseMode, TokenSource
from spolia_node.metrics import Metrics

SOURCES = {source.value: source.name for source in TokenSource}
KINDS = {kind.value: kind.name for kind in ChunkKind}
REASONS = {reason.value: reason.name for reason in MissReason}
PLANES: dict[int, str] = {common_pb2.DATA_PLANE_GRPC: "GRPC", common_pb2.DATA_PLANE_NIXL: "NIXL"}


class Sharing(Enum):
    """What became of a document that may be stored under the tenant `shared`."""

    SHARED = "shared"
    """It is: reused from there."""
    OWN = "own"
    """It is not: named by its tenant's own id."""
    UNASKED = "unasked"
    """The store was away or late: named by its tenant's own id."""


class GatewayMetrics:
    """Counters of one gateway. Calls and their status codes are counted by the node itself."""

    def __init__(self, metrics: Metrics, tenant_id: str) -> None:
        """Of `tenant_id`, whose requests this gateway takes, every known series is there before the first request."""
        self._finished = metrics.counter(
            "spolia_gateway_generations_total", "Generations that came to their finish.", "tenant", "mode"
        )
        self._replays = metrics.counter(
            "spolia_gateway_replays_total", "Times an answer that broke off went on at another decode node.", "tenant"
        )
        self._generated = metrics.counter(
            "spolia_gateway_generated_tokens_total", "Tokens passed on to clients.", "tenant"
        )
        self._sharing = metrics.counter(
            "spolia_gateway_shared_documents_total",
            "Documents of LINKED requests, each once a request, by whether the shared copy is reused.",
            "outcome",
        )
        self._first_token = metrics.histogram(
            "spolia_gateway_ttft_seconds", "Arrival of a request to its first token passed on.", "mode"
        )
        self._reuse = _ReuseCounters(metrics)
        self.begin(tenant_id)

    def begin(self, tenant_id: str) -> None:
        """Makes every series of a tenant, at zero."""
        self._replays.labels(tenant_id)
        self._generated.labels(tenant_id)
        for sharing in Sharing:
            self._sharing.labels(sharing.value)
        for mode in ReuseMode:
            self._finished.labels(tenant_id, mode.name)
            self._first_token.labels(mode.name)
        self._reuse.begin(tenant_id)

    def count_tokens(self, tenant_id: str, num_tokens: int) -> None:
        """Tokens go to a client."""
        self._generated.labels(tenant_id).inc(num_tokens)

    def count_replay(self, tenant_id: str) -> None:
        """A node takes over an answer of which the client has a part."""
        self._replays.labels(tenant_id).inc()

    def count_sharing(self, sharing: Sharing, num_documents: int) -> None:
        """Documents of a request that may be stored under the tenant `shared` got their ids."""
        self._sharing.labels(sharing.value).inc(num_documents)

    def count_finish(self, tenant_id: str, mode: ReuseMode, finish: common_pb2.Finish) -> None:
        """A generation is complete."""
        self._finished.labels(tenant_id, mode.name).inc()
        self._reuse.count(tenant_id, finish.reuse)

    def request_arrived(self) -> FirstToken:
        """Measures a request from now to its first token."""
        return FirstToken(self._first_token)


class FirstToken:
    """Waits for the first token of one request, and says how long that took."""

    def __init__(self, histogram: Histogram, now: Callable[[], float] = time.monotonic) -> None:
        self._histogram = histogram
        self._now = now
        self._arrived_s = now()
        self._came = False

    def passed_on(self, num_tokens: int, mode: ReuseMode) -> None:
        """Tokens go to the client. Only the first count, and text without a new token is none."""
        if num_tokens and not self._came:
            self._came = True
            self._histogram.labels(mode.name).observe(self._now() - self._arrived_s)


class _ReuseCounters:
    """What reuse reports add up to: tokens by source, misses by kind and reason, bytes by kind and plane.

    The hit rate in tokens is the share of sources that are no computation; docs/architecture.md has the query.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._prompt = metrics.counter(
            "spolia_gateway_prompt_tokens_total", "Prompt tokens by where their KV came from.", "tenant", "source"
        )
        self._misses = metrics.counter(
            "spolia_gateway_misses_total", "Chunks wanted and not had, by why.", "tenant", "kind", "reason"
        )
        self._missed_tokens = metrics.counter(
            "spolia_gateway_missed_tokens_total",
            "Tokens of chunks wanted and not had, by why.",
            "tenant",
            "kind",
            "reason",
        )
        self._bytes = metrics.counter(
            "spolia_gateway_kv_bytes_total",
            "Bytes of KV moved for requests: stored chunks fetched, live KV handed off, chunks that travelled inline.",
            "tenant",
            "kind",
            "plane",
        )

    def begin(self, tenant_id: str) -> None:
        """Makes every series of a tenant that this release has names for."""
        for source in SOURCES.values():
            self._prompt.labels(tenant_id, source)
        for labels in product([tenant_id], KINDS.values(), REASONS.values()):
            self._misses.labels(*labels)
            self._missed_tokens.labels(*labels)
        for plane in PLANES.values():
            for kind in ("CHUNK", "LIVE", "INLINE"):
                self._bytes.labels(tenant_id, kind, plane)

    def count(self, tenant_id: str, report: common_pb2.ReuseReport) -> None:
        """Adds one request's report."""
        for source in report.sources:
            self._prompt.labels(tenant_id, _name(SOURCES, source.source)).inc(source.num_tokens)
        for miss in report.misses:
            labels = tenant_id, _name(KINDS, miss.kind), _name(REASONS, miss.reason)
            self._misses.labels(*labels).inc()
            self._missed_tokens.labels(*labels).inc(miss.num_tokens)
        for transfer in report.transfers:
            plane = _name(PLANES, transfer.plane)
            self._bytes.labels(tenant_id, "CHUNK", plane).inc(transfer.chunk_bytes)
            self._bytes.labels(tenant_id, "LIVE", plane).inc(transfer.live_bytes)
            self._bytes.labels(tenant_id, "INLINE", plane).inc(transfer.inline_bytes)


def _name(names: Mapping[int, str], number: int) -> str:
    """The label of an enum value. A newer node may send values that this release does not know."""
    return names.get(number, f"UNKNOWN_{number}")
