"""`spolia cache gc`: collect what is of no use."""

from __future__ import annotations

from typing import Annotated

import typer

from spolia.cli.cache.options import DEFAULT_ADDRESS, Address, Json, Stores, Timeout
from spolia.cli.cache.stores import failures, finish, open_stores
from spolia.cli.output import notes, plain_record, print_columns, print_json
from spolia.cli.units import human_bytes, parse_duration
from spolia.errors import InvalidRequest
from spolia.store_results import Collected

COLUMNS = (
    "store",
    "orphan files",
    "orphan size",
    "lost rows",
    "quarantined",
    "quarantine size",
    "dropped objects",
    "dropped size",
)


def gc(
    drop_unknown: Annotated[
        bool, typer.Option("--drop-unknown", help="Also drop objects of a format or codec the store does not know.")
    ] = False,
    idle: Annotated[
        str, typer.Option(metavar="DURATION", help="Also drop what nobody used or pinned for so long, like 12h or 7d.")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    store: Stores = None,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 600.0,
    as_json: Json = False,
) -> None:
    """Have the stores collect files without a row, rows without a file, and what is in quarantine."""
    idle_s = _idle_s(idle)
    with open_stores(store, address, timeout) as stores:
        collected = stores.collect(drop_unknown=drop_unknown, idle_s=idle_s, dry_run=dry_run)
    total = sum(collected.answers.values(), Collected())
    if as_json:
        per_store = [{"store": at, **plain_record(one)} for at, one in collected.answers.items()]
        print_json({"dry_run": dry_run, "total": total, "stores": per_store, "failed": failures(collected.failed)})
    else:
        rows = [_cells(at, one) for at, one in collected.answers.items()]
        print_columns(COLUMNS, *rows, _cells("all", total))
        if dry_run:
            notes().print("nothing was changed; this is what would be collected")
    finish(collected.failed)


def _idle_s(idle: str) -> float:
    """Seconds; 0 where idle objects stay. "0s" would read as "everything" and do nothing."""
    if not idle:
        return 0.0
    idle_s = parse_duration(idle, "--idle")
    if not idle_s:
        raise InvalidRequest("--idle must be longer than nothing", field="--idle", limit="> 0s", actual=idle)
    return idle_s


def _cells(store: str, one: Collected) -> tuple[str, ...]:
    orphans = (str(one.orphan_files), human_bytes(one.orphan_bytes), str(one.lost_rows))
    quarantined = (str(one.quarantined_files), human_bytes(one.quarantined_bytes))
    return (store, *orphans, *quarantined, str(one.dropped_objects), human_bytes(one.dropped_bytes))
