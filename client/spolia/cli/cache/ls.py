"""`spolia cache ls`: what the stores hold."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated

import typer

from spolia.cli.cache.objects import COLUMNS, NO_OBJECTS, as_json, cells
from spolia.cli.cache.options import DEFAULT_ADDRESS, Address, Json, Stores, Tenant, Timeout
from spolia.cli.cache.stores import failures, finish, open_stores
from spolia.cli.output import print_json, print_table
from spolia.store_results import StoredObject


class Order(StrEnum):
    """What to sort by, the largest first."""

    AGE = "age"
    IDLE = "idle"
    SIZE = "size"
    HITS = "hits"


KEY_OF: dict[Order, Callable[[StoredObject], float]] = {
    Order.AGE: lambda found: found.age_s,
    Order.IDLE: lambda found: found.idle_s,
    Order.SIZE: lambda found: found.size_bytes,
    Order.HITS: lambda found: found.hits,
}


def ls(
    tenant: Tenant = "",
    id_prefix: Annotated[str, typer.Option("--id", metavar="HEX", help="Only ids that begin so.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="Most objects to show; 0: all.")] = 0,
    sort: Annotated[
        Order | None, typer.Option(help="Oldest, longest idle, largest or most hit first; default: by tenant and id.")
    ] = None,
    full_ids: Annotated[bool, typer.Option("--full-ids", help="All digits of ids and fingerprints.")] = False,
    store: Stores = None,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 60.0,
    as_json_: Json = False,
) -> None:
    """List the objects that stores hold, each once, also those that would never be served."""
    with open_stores(store, address, timeout) as stores:
        # What comes first is known only when all are there.
        listing = stores.list_objects(tenant_id=tenant, id_prefix=id_prefix, limit=0 if sort else limit)
    objects = sorted(listing.objects, key=KEY_OF[sort], reverse=True) if sort else list(listing.objects)
    if limit:
        objects = objects[:limit]
    if as_json_:
        print_json({"objects": [as_json(found) for found in objects], "failed": failures(listing.failed)})
    else:
        print_table(COLUMNS, [cells(found, full_ids=full_ids) for found in objects], empty=NO_OBJECTS)
    finish(listing.failed)
