"""What each tenant has under way at this gateway, held against its limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from spolia_core.errors import Busy, InvalidRequest
from spolia_gateway.caller import Caller
from spolia_gateway.in_flight import InFlight
from spolia_node.metrics import Metrics

LIMITS = REQUESTS, TOKENS = "requests", "tokens"
REQUESTS_RETRY_MS = 500
TOKENS_RETRY_MS = 1000


class TenantUse:
    """Counts by tenant. All of it ends with the blocks that hold it."""

    def __init__(self, metrics: Metrics) -> None:
        self._requests = InFlight()
        self._tokens = InFlight()
        self._refused = metrics.counter(
            "spolia_gateway_limited_total", "Requests put off because their tenant had its limit.", "tenant", "limit"
        )

    def begin(self, tenant_id: str) -> None:
        """Makes the counts of a tenant, at zero."""
        for limit in LIMITS:
            self._refused.labels(tenant_id, limit)

    @property
    def requests(self) -> Mapping[str, int]:
        """Requests under way; a live view. Tenants without are absent."""
        return self._requests.counts

    @property
    def tokens(self) -> Mapping[str, int]:
        """Tokens in flight, likewise."""
        return self._tokens.counts

    @contextmanager
    def request(self, caller: Caller) -> Iterator[None]:
        """Holds one request for as long as the block runs. Raises `Busy` at the limit."""
        limit = caller.limits.max_requests
        if limit and self.requests.get(caller.tenant_id, 0) >= limit:
            raise self._busy(caller, REQUESTS, f"{limit} requests under way", limit, REQUESTS_RETRY_MS)
        with self._requests.hold(caller.tenant_id):
            yield

    @contextmanager
    def request_tokens(self, caller: Caller, num_tokens: int, field: str) -> Iterator[None]:
        """Holds a request's tokens. Raises `Busy` at the limit, `InvalidRequest` naming `field` for too many at all."""
        limit = caller.limits.max_tokens
        if limit and num_tokens > limit:
            raise InvalidRequest(
                f"the request may come to {num_tokens} tokens; its tenant may have {limit} in flight",
                field=field,
                limit=f"{limit} tokens, the prompt's or documents' included",
                actual=f"{num_tokens} tokens",
            )
        taken = self.tokens.get(caller.tenant_id, 0)
        if limit and taken + num_tokens > limit:
            raise self._busy(caller, TOKENS, f"{taken} tokens in flight of {limit}", limit, TOKENS_RETRY_MS)
        with self._tokens.hold(caller.tenant_id, num_tokens):
            yield

    def _busy(self, caller: Caller, what: str, has: str, limit: int, retry_ms: int) -> Busy:
        self._refused.labels(caller.tenant_id, what).inc()
        return Busy(
            f"tenant {caller.tenant_id} has {has}, as many as it may",
            field="authorization",
            limit=f"{limit} {what}",
            retry_after_ms=retry_ms,
        )
