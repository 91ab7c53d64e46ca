"""What to tell a client when a store is away, or is full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from spolia.v1 import kvstore_pb2
from spolia_core.errors import Unavailable
from spolia_node.logs import get_log

RETRY_AFTER_MS = 1000

log = get_log(__name__)


@contextmanager
def store_away_in_words() -> Iterator[None]:
    """Around calls to the store: what gRPC says of a connection goes to the log, and the client is told what it means.

    Raises `Unavailable` for `Unavailable`.
    """
    try:
        yield
    except Unavailable as error:
        log.warning("store not reached", error=error.message)
        which = f"stores {error.actual}" if error.field == "stores" else "the store"
        raise Unavailable(
            f"{which} cannot be reached now: is the kvstore process running?",
            field="store",
            retry_after_ms=RETRY_AFTER_MS,
        ) from error


def not_kept(chunk_id: bytes, size_bytes: int, stats: kvstore_pb2.GetStatsResponse) -> Unavailable:
    """For a chunk that was computed, and that a store which can be reached did not take."""
    return Unavailable(
        f"chunk {chunk_id.hex()} was computed, but no store kept its {size_bytes} bytes: {stats.used_bytes} of "
        f"{stats.budget_bytes} bytes are in use there, with {stats.num_pins} pins and {stats.num_transfers} transfers; "
        "try again once some of these have ended, or give it more (its budget_bytes, max_object_bytes)",
        field="documents",
        limit=f"{stats.budget_bytes} bytes",
        actual=f"{size_bytes} bytes",
        retry_after_ms=RETRY_AFTER_MS if size_bytes <= stats.budget_bytes else 0,
    )
