"""All about one object: what it is, and each store that holds it."""

from __future__ import annotations

from spolia.cli.cache.objects import as_json as object_as_json
from spolia.cli.cache.objects import words
from spolia.cli.cache.stores import failures
from spolia.cli.output import print_columns, print_json
from spolia.cli.units import human_bytes, human_seconds
from spolia.store_results import Listing, Pin, StoredObject, StoredReplica


def show(found: Listing, *, as_json: bool) -> None:
    """Prints the one object that was found."""
    (one,) = found.objects
    if as_json:
        print_json({"object": object_as_json(one), "failed": failures(found.failed)})
        return
    print_columns(*_what_it_is(one))
    for replica in one.replicas:
        print()
        print_columns(*_replica(replica))


def _what_it_is(one: StoredObject) -> tuple[tuple[str, str], ...]:
    return (
        ("chunk", one.chunk_id.hex()),
        ("tenant", one.tenant_id),
        ("kind", one.kind),
        ("tokens", str(one.num_tokens)),
        ("model", one.fingerprint.hex()),
    )


def _replica(replica: StoredReplica) -> tuple[tuple[str, str], ...]:
    compute = f"{replica.compute_s:.3g} s" if replica.compute_s else "not measured"
    return (
        ("store", replica.store),
        ("tiers", ", ".join(replica.tiers)),
        ("state", words(replica.state)),
        ("replica", replica.replica),
        ("size", f"{human_bytes(replica.size_bytes)} ({replica.size_bytes} bytes)"),
        ("digest", replica.digest.hex()),
        ("codec", replica.codec),
        ("format", str(replica.format_version)),
        ("computed in", compute),
        ("age", human_seconds(replica.age_s)),
        ("idle", human_seconds(replica.idle_s)),
        ("hits", str(replica.hits)),
        ("pins", "; ".join(map(_pin, replica.pins)) or "none"),
    )


def _pin(pin: Pin) -> str:
    return f"{pin.owner}, {human_seconds(pin.remaining_s)} left"
