"""`spolia cache stat`: how the stores are, or all about one object."""

from __future__ import annotations

from typing import Annotated

import typer

from spolia.cli.cache import stat_object, stat_stores
from spolia.cli.cache.options import DEFAULT_ADDRESS, Address, Json, Stores, Timeout
from spolia.cli.cache.stores import finish, open_stores


def stat(
    chunk_id: Annotated[
        str | None, typer.Argument(metavar="ID", help="First hex digits of a chunk id, 4 or more.")
    ] = None,
    tenant: Annotated[
        str, typer.Option("--tenant", help="With an ID: its tenant. Else: of the table of tenants, this one alone.")
    ] = "",
    store: Stores = None,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 30.0,
    as_json: Json = False,
) -> None:
    """Show how full, how busy and how healthy the stores are; with an ID, all about one object."""
    with open_stores(store, address, timeout) as stores:
        if chunk_id is None:
            counted = stores.stats()
            stat_stores.show(counted, tenant, as_json=as_json)
            failed = counted.failed
        else:
            found = stores.find([chunk_id], tenant_id=tenant)
            stat_object.show(found, as_json=as_json)
            failed = found.failed
    finish(failed)
