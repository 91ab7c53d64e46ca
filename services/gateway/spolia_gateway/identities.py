"""From what a caller shows to who it is. Both fronts ask here, and nowhere else is a tenant made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from enum import Enum

from spolia_core.errors import Forbidden, Unauthenticated
from spolia_core.key_book import KeyBook, Role
from spolia_gateway.caller import Caller
from spolia_node.logs import get_log
from spolia_node.metrics import Metrics

EVERY_ROLE = frozenset(Role)
NEEDS: dict[str, Role] = {
    "Generate": Role.USER,
    "Warm": Role.USER,
    "Forget": Role.USER,
    "Tokenize": Role.USER,
    "RenderChat": Role.USER,
    "ListModels": Role.USER,
    "GetCluster": Role.OPERATOR,
}
"""Which role a call of the gateway takes; HTTP routes ask for the role of what they do."""
EVERY_CALL = "Generate"
"""What stands for all calls that users make."""

log = get_log(__name__)


class Refusal(Enum):
    """Why somebody was not let in; a label of the metric."""

    NO_KEY = "no_key"
    NOT_BEARER = "not_bearer"
    UNKNOWN_KEY = "unknown_key"
    EXPIRED_KEY = "expired_key"
    ROLE = "role"
    HOST = "host"
    """Over HTTP, where nobody shows a key: under a name that is not this machine's."""
    ORIGIN = "origin"
    """Likewise: for a page that is not."""


class Identities:
    """Knows callers by their keys. `book` gives the newest keys, None where there are none to show."""

    def __init__(
        self,
        book: Callable[[], KeyBook] | None,
        anonymous: Caller | None,
        metrics: Metrics,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`anonymous` is who a caller without a key is; None refuses it."""
        self._book = book
        self._anonymous = anonymous
        self._now = now
        refused = metrics.counter("spolia_gateway_refused_total", "Calls refused for who made them.", "reason")
        self._refused = {refusal: refused.labels(refusal.value) for refusal in Refusal}

    def of(self, bearer: str | None) -> Caller:
        """Who shows this token, without the word "Bearer" before it; None for nothing at all.

        Raises `Unauthenticated`, with the same words for a key that never was and one that was withdrawn. A gateway
        without keys takes any token for none: clients that cannot go without send something.
        """
        if self._book is None or bearer is None:
            if self._anonymous is None:
                raise self._refusal(Refusal.NO_KEY, "an API key is needed: authorization: Bearer sk-spolia-…")
            return self._unnamed(self._anonymous)
        book = self._book()
        record = book.find(bearer)
        if record is None:
            raise self._refusal(Refusal.UNKNOWN_KEY, "this API key is not known")
        if record.expires_at is not None and record.expires_at <= self._now():
            ended = record.expires_at.isoformat()
            raise self._refusal(Refusal.EXPIRED_KEY, f"the API key {record.key_id} ended at {ended}", record.key_id)
        return Caller(record.tenant_id, record.roles, book.limits_of(record.tenant_id), record.key_id)

    def _unnamed(self, anonymous: Caller) -> Caller:
        return (
            anonymous if self._book is None else replace(anonymous, limits=self._book().limits_of(anonymous.tenant_id))
        )

    def of_header(self, authorization: str | None) -> Caller:
        """Who sends this `authorization` header. Raises `Unauthenticated`, also for another scheme than Bearer."""
        if authorization is None:
            return self.of(None)
        scheme, _, token = authorization.strip().partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise self._refusal(Refusal.NOT_BEARER, "authorization must be: Bearer, a space, and an API key")
        return self.of(token.strip())

    def check_may(self, caller: Caller, call: str) -> None:
        """Raises `Forbidden` unless the caller's roles allow `call`, a name in `NEEDS`."""
        try:
            caller.check_may(call, NEEDS[call])
        except Forbidden as error:
            self.note(Refusal.ROLE, error.message, caller.key_id)
            raise

    def _refusal(self, why: Refusal, message: str, key_id: str = "") -> Unauthenticated:
        self.note(why, message, key_id)
        return Unauthenticated(message, field="authorization")

    def note(self, why: Refusal, message: str, key_id: str = "") -> None:
        """Counts and logs that somebody was not let in."""
        self._refused[why].inc()
        log.warning("caller refused", reason=why.value, key_id=key_id, error=message)
