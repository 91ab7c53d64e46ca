"""What to tell a client when a store is away, fails, or is full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from spolia.v1 import kvstore_pb2
from spolia_core.errors import (
    Cancelled,
    DataCorrupt,
    DeadlineExceeded,
    InternalError,
    SpoliaError,
    Unavailable,
)
from spolia_node.logs import get_log

RETRY_AFTER_MS = 1000

_WORDS: dict[type[SpoliaError], str] = {
    Cancelled: "the store ended the call; try again",
    DataCorrupt: "the store answered what does not fit the question; try again",
    DeadlineExceeded: "the store did not answer in time; give it more",
    InternalError: "the store failed, and its log says why; tell those who run this gateway",
}

log = get_log(__name__)


@contextmanager
def store_failures_in_words() -> Iterator[None]:
    """Around calls to the store: what gRPC or a store says of itself, with addresses, goes to the log, and the client
    is told what it means.

    Raises errors of the same classes. What a store says of the request itself passes as it is.
    """
    try:
        yield
    except Unavailable as error:
        log.warning("store not reached", error=error.message)
        which = f"stores {error.actual}" if error.field == "stores" and error.actual else "the store"
        raise Unavailable(
            f"{which} cannot be reached now: is the kvstore process running?",
            field="store",
            retry_after_ms=RETRY_AFTER_MS,
        ) from error
    except tuple(_WORDS) as error:
        log.warning("store failed", error=repr(error))
        kind = next(known for known in _WORDS if isinstance(error, known))
        raise kind(_WORDS[kind], field="store", retry_after_ms=error.retry_after_ms) from error


def not_kept(tenant_id: str, chunk_id: bytes, size_bytes: int, stats: kvstore_pb2.GetStatsResponse) -> Unavailable:
    """For a chunk that was computed, and that a store which can be reached did not take."""
    held = next((each for each in stats.tenants if each.tenant_id == tenant_id), kvstore_pb2.TenantStats())
    quota = ""
    if held.quota_bytes or held.quota_objects:
        quota = (
            f"; tenant {tenant_id} holds {held.num_bytes} of {held.quota_bytes or 'any number of'} bytes and "
            f"{held.num_objects} of {held.quota_objects or 'any number of'} objects of its quota"
        )
    most = min(stats.budget_bytes, held.quota_bytes or stats.budget_bytes)
    return Unavailable(
        f"chunk {chunk_id.hex()} was computed, but no store kept its {size_bytes} bytes: {stats.used_bytes} of "
        f"{stats.budget_bytes} bytes are in use there, with {stats.num_pins} pins and {stats.num_transfers} transfers"
        f"{quota}; try again once some of these have ended, or give it more (its budget_bytes, max_object_bytes, the "
        "tenant's quota)",
        field="documents",
        limit=f"{most} bytes",
        actual=f"{size_bytes} bytes",
        retry_after_ms=RETRY_AFTER_MS if size_bytes <= most else 0,
    )
