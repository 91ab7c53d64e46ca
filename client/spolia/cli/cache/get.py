"""`spolia cache get`: the bytes of an object, in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spolia.cli.cache.options import DEFAULT_ADDRESS, Address, Json, Stores, Tenant, Timeout
from spolia.cli.cache.stores import failures, finish, open_stores
from spolia.cli.output import notes, print_json
from spolia.cli.units import human_bytes


def get(
    chunk_id: Annotated[str, typer.Argument(metavar="ID", help="First hex digits of a chunk id, 4 or more.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write; replaced when every digest was right.")],
    tenant: Tenant = "",
    store: Stores = None,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 300.0,
    as_json: Json = False,
) -> None:
    """Download an object, a safetensors file, and check every digest of it.

    Stores that hold it are tried in turn. One that cannot be reached is exit code 3 and a damaged copy 1, also where
    another gave a good one.
    """
    with open_stores(store, address, timeout) as stores:
        listing = stores.find([chunk_id], tenant_id=tenant)
        (found,) = listing.objects
        got = stores.download(found, out)
    failed = {**listing.failed, **got.failed}
    if as_json:
        print_json(
            {
                "tenant_id": found.tenant_id,
                "chunk_id": found.chunk_id,
                "out": str(out),
                "store": got.store,
                "tier": got.tier,
                "size_bytes": got.size_bytes,
                "digest": got.digest,
                "failed": failures(failed),
            }
        )
    else:
        size = human_bytes(got.size_bytes)
        line = f"{found.chunk_id.hex()} of {found.tenant_id}: {size} from {got.tier} of {got.store}"
        notes().print(f"{line}, digests right, in {out}", markup=False)
    finish(failed)
