"""`spolia cache rm`: drop objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from spolia.cli.cache.objects import short
from spolia.cli.cache.options import DEFAULT_ADDRESS, Address, Ids, Json, Stores, Tenant, Timeout
from spolia.cli.cache.stores import failures, finish, open_stores
from spolia.cli.output import plain_record, print_columns, print_json
from spolia.cli.units import counted, human_bytes, human_seconds
from spolia.errors import InvalidRequest
from spolia.store_results import Deleted, PerStore, StoredObject

COLUMNS = ("store", "objects", "size", "copies")


def rm(
    ids: Ids,
    tenant: Tenant = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also what is pinned.")] = False,
    store: Stores = None,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 60.0,
    as_json: Json = False,
) -> None:
    """Drop objects from every tier of every store. Whoever reads one now finishes.

    Nothing is dropped when an ID names no object or several, or when one of the objects is pinned.
    """
    with open_stores(store, address, timeout) as stores:
        found = stores.find(ids, tenant_id=tenant)
        if not force:
            _refuse_pinned(found.objects)
        if not yes:
            _ask(found.objects)
        dropped = stores.delete(found.objects)
    failed = {**found.failed, **dropped.failed}
    if as_json:
        print_json(_as_json(found.objects, dropped) | {"failed": failures(failed)})
    else:
        print_columns(COLUMNS, *(_cells(at, deleted) for at, deleted in dropped.answers.items()))
    finish(failed)


def _refuse_pinned(objects: Sequence[StoredObject]) -> None:
    pinned = [found for found in objects if found.pins]
    if not pinned:
        return
    held = "; ".join(
        f"{short(found.chunk_id)} by {pin.owner} for {human_seconds(pin.remaining_s)}"
        for found in pinned
        for pin in found.pins
    )
    raise InvalidRequest(
        f"pinned: {held}; --force drops them all the same", field="--force", limit="not pinned", actual=held
    )


def _ask(objects: Sequence[StoredObject]) -> None:
    """Ends the command unless the person agrees."""
    size = human_bytes(sum(replica.size_bytes for found in objects for replica in found.replicas))
    names = ", ".join(short(found.chunk_id) for found in objects[:5]) + (" …" if len(objects) > 5 else "")
    typer.confirm(f"drop {counted(len(objects), 'object')} ({names}; {size} at all stores)?", abort=True, err=True)


def _cells(store: str, deleted: Deleted) -> tuple[str, ...]:
    copies = ", ".join(f"{tier} {count}" for tier, count in deleted.copies.items())
    return (store, str(deleted.num_objects), human_bytes(deleted.num_bytes), copies)


def _as_json(objects: Sequence[StoredObject], dropped: PerStore[Deleted]) -> dict[str, object]:
    """An object dropped at two stores counts once in `objects`, and at each of the stores."""
    stores = [{"store": store, **plain_record(deleted)} for store, deleted in dropped.answers.items()]
    names = [{"tenant_id": found.tenant_id, "chunk_id": found.chunk_id} for found in objects]
    return {"objects": names, "total": plain_record(sum(dropped.answers.values(), Deleted())), "stores": stores}
