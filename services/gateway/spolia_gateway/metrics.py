"""What a gateway counts, most of it per tenant."""

from __future__ import annotations

from enum import Enum

from spolia.v1 import common_pb2
from spolia_core.reuse import ReuseMode
from spolia_node.metrics import Metrics


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

    def __init__(self, metrics: Metrics) -> None:
        self._finished = metrics.counter(
            "spolia_gateway_generations_total", "Generations that came to their finish.", "tenant", "mode"
        )
        self._replays = metrics.counter(
            "spolia_gateway_replays_total", "Times an answer that broke off went on at another decode node.", "tenant"
        )
        self._generated = metrics.counter(
            "spolia_gateway_generated_tokens_total", "Tokens passed on to clients.", "tenant"
        )
        self._prompt = metrics.counter(
            "spolia_gateway_prompt_tokens_total", "Prompt tokens by where their KV came from.", "tenant", "source"
        )
        self._sharing = metrics.counter(
            "spolia_gateway_shared_documents_total",
            "Documents of LINKED requests, each once a request, by whether the shared copy is reused.",
            "outcome",
        )

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
        for count in finish.reuse.sources:
            self._prompt.labels(tenant_id, _source_name(count.source)).inc(count.num_tokens)


def _source_name(source: common_pb2.TokenSource.ValueType) -> str:
    """A newer node may know sources that this release does not."""
    if source not in common_pb2.TokenSource.values():
        return f"UNKNOWN_{source}"
    return common_pb2.TokenSource.Name(source).removeprefix("TOKEN_SOURCE_")
