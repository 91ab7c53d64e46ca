"""What a gateway counts, most of it per tenant."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from itertools import product

from prometheus_client import Counter

from spolia.v1 import common_pb2
from spolia_core.reuse import ChunkKind, FinishReason, MissReason, ReuseMode, TokenSource
from spolia_gateway.backlog import Pace
from spolia_gateway.latency import Latencies, RequestLatency
from spolia_gateway.recent import RecentServing
from spolia_node.metrics import Metrics

SOURCES = {source.value: source.name.lower() for source in TokenSource}
COMPUTED_SOURCES = ("computed", "link", "compiled")
"""Sources that are work done for the request; all others are reuse."""

KINDS = {kind.value: kind.name.lower() for kind in ChunkKind}
REASONS = {reason.value: reason.name.lower() for reason in MissReason}
FINISH_REASONS = {reason.value: reason.name.lower() for reason in FinishReason}
PLANES: dict[int, str] = {common_pb2.DATA_PLANE_GRPC: "grpc", common_pb2.DATA_PLANE_NIXL: "nixl"}
MOVED = ("chunk", "live", "inline")
TOKEN_BUCKETS = tuple(float(1 << power) for power in range(0, 19, 1))


class Sharing(Enum):
    """What became of a document that may be stored under the tenant `shared`."""

    SHARED = "shared"
    """It is: reused from there."""
    OWN = "own"
    """It is not: named by its tenant's own id."""
    UNASKED = "unasked"
    """The store was away or late: named by its tenant's own id."""


class Way(Enum):
    """How an answer came from its decode node."""

    SHARED = "shared"
    """On a stream that carries many."""
    OWN = "own"
    """On its request's own call."""


class Asked(Enum):
    """How a request went to its decode node."""

    STREAM = "stream"
    """With others, on the stream that carries their answers."""
    CALL = "call"
    """By a call of its own."""


class GatewayMetrics:
    """Counters of one gateway. Calls and their status codes are counted by the node itself."""

    def __init__(self, metrics: Metrics, tenant_id: str) -> None:
        """Of `tenant_id`, whose requests this gateway takes, every known series is there before the first request."""
        self._finished = metrics.counter(
            "spolia_request_success_total",
            "Answers that came to their finish, by mode and by why the first sample ended.",
            "tenant",
            "mode",
            "finish_reason",
        )
        self._replays = metrics.counter(
            "spolia_gateway_replays_total", "Times an answer that broke off went on at another decode node.", "tenant"
        )
        answers = metrics.counter(
            "spolia_gateway_answers_total",
            "Answers of decode nodes that ended, by the way they came and how their readers kept up.",
            "way",
            "reader",
        )
        asked = metrics.counter(
            "spolia_gateway_asked_total", "Requests given to decode nodes, replays too, by how they went.", "way"
        )
        self._generated = metrics.counter("spolia_generation_tokens_total", "Tokens passed on to clients.", "tenant")
        sharing = metrics.counter(
            "spolia_gateway_shared_documents_total",
            "Documents of LINKED requests, each once a request, by whether the shared copy is reused.",
            "outcome",
        )
        self._prompt_length = metrics.histogram(
            "spolia_request_prompt_tokens", "Prompt tokens of a finished request.", buckets=TOKEN_BUCKETS
        )
        self._answer_length = metrics.histogram(
            "spolia_request_generation_tokens",
            "Tokens of all samples of a finished request.",
            buckets=TOKEN_BUCKETS,
        )
        self.recent = RecentServing()
        self._latencies = Latencies(metrics, self.recent)
        self._reuse = _ReuseCounters(metrics)
        self._generated_by_tenant: dict[str, Counter] = {}
        # Every series is there from the start; and labels are looked up under a lock: not for every request.
        self._answers = {(way, pace): answers.labels(way.value, pace.value) for way, pace in product(Way, Pace)}
        self._asked = {way: asked.labels(way.value) for way in Asked}
        self._sharing = {outcome: sharing.labels(outcome.value) for outcome in Sharing}
        self.begin(tenant_id)

    def begin(self, tenant_id: str) -> None:
        """Makes every series of a tenant that this release has names for. Says nothing new the second time."""
        self._replays.labels(tenant_id)
        self._generated.labels(tenant_id)
        for mode, reason in product(ReuseMode, FINISH_REASONS.values()):
            self._finished.labels(tenant_id, mode.name.lower(), reason)
        self._reuse.begin(tenant_id)

    def count_tokens(self, tenant_id: str, num_tokens: int) -> None:
        """Tokens go to a client."""
        counter = self._generated_by_tenant.get(tenant_id)
        if counter is None:  # labels are looked up under a lock: not for every token
            counter = self._generated_by_tenant[tenant_id] = self._generated.labels(tenant_id)
        counter.inc(num_tokens)

    def count_replay(self, tenant_id: str) -> None:
        """A node takes over an answer of which the client has a part."""
        self._replays.labels(tenant_id).inc()

    def count_asked(self, asked: Asked) -> None:
        """A request goes to a decode node."""
        self._asked[asked].inc()

    def count_answer(self, way: Way, pace: Pace) -> None:
        """A decode node's answer has ended, well or not."""
        self._answers[way, pace].inc()

    def count_sharing(self, sharing: Sharing, num_documents: int) -> None:
        """Documents of a request that may be stored under the tenant `shared` got their ids."""
        self._sharing[sharing].inc(num_documents)

    def count_finish(self, tenant_id: str, mode: ReuseMode, finish: common_pb2.Finish) -> None:
        """A generation is complete."""
        self._finished.labels(tenant_id, mode.name.lower(), _name(FINISH_REASONS, finish.reason)).inc()
        self._prompt_length.observe(finish.num_prompt_tokens)
        self._answer_length.observe(finish.num_generated_tokens)
        num_prompt_tokens, num_cached_tokens = self._reuse.count(tenant_id, finish.reuse)
        self.recent.finished(num_prompt_tokens, num_cached_tokens, finish.num_generated_tokens)

    def request_arrived(self) -> RequestLatency:
        """Measures a request from now on."""
        return self._latencies.request_arrived()


class _ReuseCounters:
    """What reuse reports add up to: tokens by source, misses by kind and reason, bytes by kind and plane.

    A prompt's tokens are cached or computed: the hit rate in tokens is cached by all. docs/observability.md has the
    query.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._prompt = metrics.counter(
            "spolia_prompt_tokens_total", "Prompt tokens of finished requests, cached and computed.", "tenant"
        )
        self._cached = metrics.counter(
            "spolia_cached_tokens_total", "Prompt tokens whose KV was reused, by where it was.", "tenant", "source"
        )
        self._computed = metrics.counter(
            "spolia_computed_tokens_total",
            "Prompt tokens whose KV was computed for the request, by why.",
            "tenant",
            "source",
        )
        self._misses = metrics.counter(
            "spolia_cache_misses_total", "Chunks wanted and not had, by why.", "tenant", "kind", "reason"
        )
        self._missed_tokens = metrics.counter(
            "spolia_cache_missed_tokens_total",
            "Tokens of chunks wanted and not had, by why.",
            "tenant",
            "kind",
            "reason",
        )
        self._bytes = metrics.counter(
            "spolia_kv_transfer_bytes_total",
            "Bytes of KV moved for requests: stored chunks fetched, live KV handed off, chunks that travelled inline.",
            "tenant",
            "kind",
            "plane",
        )

    def begin(self, tenant_id: str) -> None:
        """Makes every series of a tenant that this release has names for."""
        self._prompt.labels(tenant_id)
        for source in SOURCES.values():
            (self._computed if source in COMPUTED_SOURCES else self._cached).labels(tenant_id, source)
        for labels in product([tenant_id], KINDS.values(), REASONS.values()):
            self._misses.labels(*labels)
            self._missed_tokens.labels(*labels)
        for labels in product([tenant_id], MOVED, PLANES.values()):
            self._bytes.labels(*labels)

    def count(self, tenant_id: str, report: common_pb2.ReuseReport) -> tuple[int, int]:
        """Adds one request's report; its prompt tokens, and those of them that were cached."""
        num_tokens = num_cached = 0
        for counted in report.sources:
            source = SOURCES.get(counted.source)
            # Of a source that this release does not know nobody here can say that it was reuse.
            is_cached = source is not None and source not in COMPUTED_SOURCES
            by_source = self._cached if is_cached else self._computed
            by_source.labels(tenant_id, _name(SOURCES, counted.source)).inc(counted.num_tokens)
            num_tokens += counted.num_tokens
            num_cached += counted.num_tokens if is_cached else 0
        self._prompt.labels(tenant_id).inc(num_tokens)
        for miss in report.misses:
            labels = tenant_id, _name(KINDS, miss.kind), _name(REASONS, miss.reason)
            self._misses.labels(*labels).inc()
            self._missed_tokens.labels(*labels).inc(miss.num_tokens)
        for transfer in report.transfers:
            plane = _name(PLANES, transfer.plane)
            self._bytes.labels(tenant_id, "chunk", plane).inc(transfer.chunk_bytes)
            self._bytes.labels(tenant_id, "live", plane).inc(transfer.live_bytes)
            self._bytes.labels(tenant_id, "inline", plane).inc(transfer.inline_bytes)
        return num_tokens, num_cached


def _name(names: Mapping[int, str], number: int) -> str:
    """The label of an enum value. A newer node may send values that this release does not know."""
    return names.get(number, f"unknown_{number}")
