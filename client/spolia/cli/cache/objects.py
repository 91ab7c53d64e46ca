"""How an object of the stores is shown."""

from __future__ import annotations

from spolia.cli.output import plain, plain_record
from spolia.cli.units import human_bytes, human_seconds
from spolia.store_results import StoredObject

SHORT_DIGITS = 12
NO_OBJECTS = "no objects"

COLUMNS = (
    "tenant",
    "chunk",
    "kind",
    "tokens",
    "size",
    "tiers",
    "stores",
    "age",
    "idle",
    "hits",
    "pins",
    "state",
    "model",
)


def short(digest: bytes) -> str:
    """The head of an id or a fingerprint: enough to tell them apart, and to name an object by."""
    return digest.hex()[:SHORT_DIGITS]


def words(name: str) -> str:
    """A member's name as it is read: "unknown codec"."""
    return name.replace("_", " ")


def cells(found: StoredObject, *, full_ids: bool = False) -> tuple[str, ...]:
    """A line of the table. "model" is the head of its fingerprint."""
    return (
        found.tenant_id,
        found.chunk_id.hex() if full_ids else short(found.chunk_id),
        found.kind,
        str(found.num_tokens),
        human_bytes(found.size_bytes),
        ",".join(found.tiers),
        ",".join(found.stores),
        human_seconds(found.age_s),
        human_seconds(found.idle_s),
        str(found.hits),
        str(len(found.pins)),
        words(found.state),
        found.fingerprint.hex() if full_ids else short(found.fingerprint),
    )


def as_json(found: StoredObject) -> dict[str, object]:
    """All there is to say, in plain numbers; `replicas` has what each store says."""
    report = plain_record(found)
    replicas = report.pop("replicas")
    return {
        **report,
        "size_bytes": found.size_bytes,
        "tiers": plain(found.tiers),
        "stores": plain(found.stores),
        "age_s": found.age_s,
        "idle_s": found.idle_s,
        "hits": found.hits,
        "pins": plain(found.pins),
        "state": found.state,
        "replicas": replicas,
    }
