"""Lets calls in by the certificate of who makes them, and counts those it refuses."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

from spolia_core.errors import Forbidden, SpoliaError, Unauthenticated
from spolia_core.node_name import role_in
from spolia_node.edges import callers_of
from spolia_node.interceptor import service_of
from spolia_node.logs import get_log
from spolia_node.metrics import Metrics

REASONS = NO_IDENTITY, WRONG_ROLE = "no_identity", "wrong_role"

log = get_log(__name__)


def peer_role(context: Any) -> str:
    """The role in the caller's certificate; empty where it showed none, or none of ours."""
    return role_in(uri.decode("utf-8", "replace") for uri in context.auth_context().get("peer_uri", ()))


class Guard:
    """The door of a node whose callers show certificates. TLS has checked who signed them, and when they end."""

    def __init__(self, metrics: Metrics, services: Iterable[str]) -> None:
        """`services` are those it stands before: their counts are there, at zero, from the start."""
        self._refused = metrics.counter(
            "spolia_refused_calls_total", "Calls refused for who made them.", "service", "reason"
        )
        for labels in product(services, REASONS):
            self._refused.labels(*labels)

    def check(self, method: str, context: Any) -> None:
        """Raises `Unauthenticated` for a caller that is no node, `Forbidden` for a role without business here."""
        role = peer_role(context)
        if not role:
            self._refuse(method, context, NO_IDENTITY, Unauthenticated("this service is for nodes of the cluster"))
        allowed = callers_of(method)
        if role not in allowed:
            who = ", ".join(sorted(allowed)) or "nobody"
            error = Forbidden(f"{method} is for {who}, not for {role}", field="role", limit=who, actual=role)
            self._refuse(method, context, WRONG_ROLE, error)

    def _refuse(self, method: str, context: Any, reason: str, error: SpoliaError) -> None:
        self._refused.labels(service_of(method), reason).inc()
        log.warning("call refused", method=method, reason=reason, peer=context.peer(), error=error.message)
        raise error
