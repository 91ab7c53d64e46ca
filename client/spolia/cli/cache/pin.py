"""`spolia cache pin`: keep objects from eviction for a while, or no longer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from spolia.cli.cache.objects import short
from spolia.cli.cache.options import DEFAULT_ADDRESS, Address, Ids, Json, Stores, Tenant, Timeout
from spolia.cli.cache.stores import failures, finish, open_stores
from spolia.cli.output import OTHER_ERROR, print_columns, print_json
from spolia.cli.units import DURATION_LIMIT, human_seconds, parse_duration
from spolia.errors import InvalidRequest
from spolia.store_admin import DEFAULT_OWNER, StoreAdmin
from spolia.store_requests import MAX_LEASE_S, MIN_LEASE_S
from spolia.store_results import ObjectName, PerStore, StoredObject


def pin(
    ids: Ids,
    duration: Annotated[
        str, typer.Option("--for", metavar="DURATION", help="How long, like 30s, 10m or 1h; at most 1h.")
    ] = "",
    end: Annotated[bool, typer.Option("--end", help="End the owner's pins instead.")] = False,
    owner: Annotated[str, typer.Option(help="Who pins; the same owner renews, and ends, only its own pins.")] = (
        DEFAULT_OWNER
    ),
    tenant: Tenant = "",
    store: Stores = None,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 60.0,
    as_json: Json = False,
) -> None:
    """Keep objects from eviction at every store that holds them, under a lease.

    Exit code 1 when one could not be pinned anywhere.
    """
    lease_s = _lease_s(duration, end=end)
    with open_stores(store, address, timeout) as stores:
        if lease_s is None:
            _end(stores, ids, tenant, owner, as_json=as_json)
        else:
            _pin(stores, ids, tenant, owner, lease_s, as_json=as_json)


def _lease_s(duration: str, *, end: bool) -> float | None:
    """Seconds to pin for; None to end pins."""
    if end == bool(duration):
        given = "both" if end else "neither"
        raise InvalidRequest(
            "give --for DURATION to pin, or --end to end pins", field="--for", limit=DURATION_LIMIT, actual=given
        )
    if end:
        return None
    lease_s = parse_duration(duration, "--for")
    if not MIN_LEASE_S <= lease_s <= MAX_LEASE_S:
        limit = f"at least {MIN_LEASE_S:g}s and at most {human_seconds(MAX_LEASE_S)}"
        raise InvalidRequest(f"--for must be {limit}, got {duration}", field="--for", limit=limit, actual=duration)
    return lease_s


def _pin(stores: StoreAdmin, ids: Sequence[str], tenant: str, owner: str, lease_s: float, *, as_json: bool) -> None:
    found = stores.find(ids, tenant_id=tenant)
    pinned = stores.pin(found.objects, lease_s=lease_s, owner=owner)
    failed = {**found.failed, **pinned.failed}
    rows = [(one, _pinned_at(one, pinned)) for one in found.objects]
    if as_json:
        objects = [
            {"tenant_id": one.tenant_id, "chunk_id": one.chunk_id, "pinned_at": at, "owner": owner, "lease_s": lease_s}
            for one, at in rows
        ]
        print_json({"objects": objects, "failed": failures(failed)})
    else:
        lines = [(one.tenant_id, short(one.chunk_id), ",".join(at) or "nowhere: it has gone") for one, at in rows]
        print_columns(("tenant", "chunk", "pinned at"), *lines)
    finish(failed, code=0 if failed or all(at for _, at in rows) else OTHER_ERROR)


def _pinned_at(one: StoredObject, pinned: PerStore[tuple[ObjectName, ...]]) -> list[str]:
    name = (one.tenant_id, one.chunk_id)
    return [
        store for store, done in pinned.answers.items() if name in {(held.tenant_id, held.chunk_id) for held in done}
    ]


def _end(stores: StoreAdmin, ids: Sequence[str], tenant: str, owner: str, *, as_json: bool) -> None:
    found = stores.find(ids, tenant_id=tenant)
    ended = stores.unpin(found.objects, owner=owner)
    failed = {**found.failed, **ended.failed}
    if as_json:
        per_store = [{"store": store, "num_unpinned": count} for store, count in ended.answers.items()]
        total = sum(ended.answers.values())
        print_json({"num_unpinned": total, "stores": per_store, "failed": failures(failed)})
    else:
        print_columns(("store", "pins ended"), *((store, str(count)) for store, count in ended.answers.items()))
    finish(failed)
