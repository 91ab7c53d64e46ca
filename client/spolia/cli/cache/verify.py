"""`spolia cache verify`: check every digest of what is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from spolia.cli.cache.objects import short
from spolia.cli.cache.options import DEFAULT_ADDRESS, Address, Json, Stores, Tenant, Timeout
from spolia.cli.cache.stores import failures, finish, open_stores
from spolia.cli.output import OTHER_ERROR, notes, plain_record, print_columns, print_json
from spolia.cli.units import counted, human_bytes
from spolia.errors import SpoliaError
from spolia.store_admin import StoreAdmin
from spolia.store_results import PerStore, StoredObject, Verified, VerifyProgress

COLUMNS = ("store", "tenant", "chunk", "tier", "reason")


def verify(
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID", help="First hex digits of chunk ids; default: everything.")
    ] = None,
    tenant: Tenant = "",
    store: Stores = None,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 3600.0,
    as_json: Json = False,
) -> None:
    """Have the stores read copies on every tier and check their digests.

    Damaged copies are taken out of service and listed; exit code 1 then.
    """
    objects: tuple[StoredObject, ...] | None = None
    failed: dict[str, SpoliaError] = {}
    with open_stores(store, address, timeout) as stores:
        if ids:
            found = stores.find(ids, tenant_id=tenant)
            objects = found.objects
            failed.update(found.failed)
        seen: dict[str, Verified] = {}
        try:
            verified = _verify(stores, objects, tenant, seen)
        except SpoliaError:
            for row in _damaged(seen):  # they are out of service, whatever became of the rest
                notes().print("damaged:", *row, markup=False)
            raise
    failed.update(verified.failed)
    known = {**seen, **verified.answers}
    answers = {one: known[one] for one in stores.addresses if one in known}  # not in the order in which they answered
    total = sum(answers.values(), Verified())
    if as_json:
        print_json(_as_json(answers, total) | {"failed": failures(failed)})
    else:
        if total.damaged:
            print_columns(COLUMNS, *_damaged(answers))
        checked = counted(total.num_checked, "copy", "copies")
        notes().print(f"checked {checked}, {human_bytes(total.bytes_checked)}; {len(total.damaged)} damaged")
    finish(failed, code=OTHER_ERROR if total.damaged else 0)


def _verify(
    stores: StoreAdmin, objects: tuple[StoredObject, ...] | None, tenant: str, seen: dict[str, Verified]
) -> PerStore[Verified]:
    """Shows how far each store is. `seen` gets what each has verified so far, also one that fails midway."""
    bar = Progress(
        TextColumn("{task.fields[store]}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[size]}", markup=False),
        console=notes(),
    )
    with bar:
        tasks = {one: bar.add_task("verifying", total=None, store=one, size="") for one in stores.addresses}

        def show(done: VerifyProgress) -> None:
            seen[done.store] = done.verified
            size = human_bytes(done.verified.bytes_checked)
            bar.update(tasks[done.store], completed=done.verified.num_checked, total=done.num_total, size=size)

        return stores.verify(objects, tenant_id=tenant, on_progress=show)


def _damaged(answers: Mapping[str, Verified]) -> list[tuple[str, ...]]:
    return [
        (store, copy.tenant_id, short(copy.chunk_id), copy.tier, copy.reason)
        for store, verified in answers.items()
        for copy in verified.damaged
    ]


def _as_json(answers: Mapping[str, Verified], total: Verified) -> dict[str, object]:
    return {
        "num_checked": total.num_checked,
        "bytes_checked": total.bytes_checked,
        "num_damaged": len(total.damaged),
        "stores": [{"store": store, **plain_record(verified)} for store, verified in answers.items()],
    }
