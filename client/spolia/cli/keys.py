"""`spolia keys`: API keys of a gateway."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from spolia.cli.options import Json
from spolia.cli.output import notes, print_json, print_table
from spolia_core.key_book import KeyBook, KeyRecord, Role, TenantLimits, new_key
from spolia_core.key_place import key_place

keys = typer.Typer(
    name="keys", help="Make, list and withdraw the API keys of gateways; changes count at once.", no_args_is_help=True
)

Place = Annotated[
    str,
    typer.Option(
        "--keys",
        envvar="SPOLIA_KEYS",
        help="Where they are: a file, or the URL of a Redis; what gateways and stores are given as keys.",
    ),
]
Tenant = Annotated[str, typer.Option("--tenant", help="Tenant of the key; its documents are seen by no other.")]


@keys.command("create")
def create(
    place: Place,
    tenant: Tenant,
    operator: Annotated[
        bool, typer.Option("--operator", help="May also see the cluster; needed for the tenant `shared`.")
    ] = False,
    days: Annotated[int | None, typer.Option(min=1, help="Days until it ends; default: it does not.")] = None,
    name: Annotated[str, typer.Option(help="Whose it is, for people.")] = "",
    as_json: Json = False,
) -> None:
    """Make a key and print it. It is printed this once: what is kept cannot be turned back into it."""
    roles = frozenset({Role.USER, Role.OPERATOR} if operator else {Role.USER})
    expires_at = None if days is None else datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
    key, record = new_key(tenant, roles, expires_at=expires_at, name=name)
    key_place(place).change(lambda book: book.with_key(record))
    if as_json:
        print_json({"key": key, **_shown(record)})
        return
    notes().print(f"{record.key_id} for tenant {record.tenant_id}; keep the key, it is not shown again:", markup=False)
    print(key)


@keys.command("list")
def list_(place: Place, as_json: Json = False) -> None:
    """List keys, by when they were made, and the limits of tenants. The keys themselves are nowhere."""
    book = KeyBook.from_bytes(key_place(place).read())
    records = sorted(book.keys.values(), key=lambda record: (record.created_at, record.key_id))
    if as_json:
        print_json({"keys": [_shown(record) for record in records], "tenants": book.limits})
        return
    print_table(("key", "tenant", "roles", "made", "ends", "name"), [_row(r) for r in records], empty="no keys")
    if book.limits:
        print()
        _print_limits(book.limits)


@keys.command("revoke")
def revoke(place: Place, key_id: Annotated[str, typer.Argument(metavar="KEY-ID", help="As `list` shows it.")]) -> None:
    """Withdraw a key. Requests under way go on; gateways refuse new ones within two seconds."""
    key_place(place).change(lambda book: book.without_key(key_id))
    notes().print(f"{key_id} is withdrawn", markup=False)


@keys.command("limit")
def limit(
    place: Place,
    tenant: Tenant,
    requests: Annotated[
        int | None, typer.Option(min=0, help="Most requests under way, at each gateway; 0: no limit.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=0, help="Most tokens in flight, at each gateway, prompts and longest answers; 0: no limit."),
    ] = None,
    cache_bytes: Annotated[
        int | None, typer.Option(min=0, help="Most bytes of stored chunks, in each store given the keys; 0: no limit.")
    ] = None,
) -> None:
    """Set how much a tenant may have at once, whatever the number of its keys, and show it. What is left out stays."""
    given = {"max_requests": requests, "max_tokens": tokens, "max_cache_bytes": cache_bytes}
    changes = {name: value for name, value in given.items() if value is not None}

    def change(book: KeyBook) -> KeyBook:
        return book.with_limits(tenant, replace(book.limits_of(tenant), **changes))

    kept = key_place(place)
    kept.change(change)
    _print_limits({tenant: KeyBook.from_bytes(kept.read()).limits_of(tenant)})


def _print_limits(limits: Mapping[str, TenantLimits]) -> None:
    rows = [(name, *map(_limit, _numbers(each))) for name, each in sorted(limits.items())]
    print_table(("tenant", "requests", "tokens in flight", "cache bytes per store"), rows, empty="")


def _shown(record: KeyRecord) -> dict[str, object]:
    return {
        "key_id": record.key_id,
        "tenant": record.tenant_id,
        "roles": _roles(record),
        "created_at": record.created_at.isoformat(),
        "expires_at": record.expires_at.isoformat() if record.expires_at else None,
        "name": record.name,
    }


def _row(record: KeyRecord) -> tuple[str, ...]:
    ends = record.expires_at
    ended = " (ended)" if ends is not None and ends <= datetime.now(UTC) else ""
    shown = f"{ends:%Y-%m-%d}{ended}" if ends is not None else "never"
    made = f"{record.created_at:%Y-%m-%d}"
    return record.key_id, record.tenant_id, ", ".join(_roles(record)), made, shown, record.name


def _roles(record: KeyRecord) -> list[str]:
    return sorted(role.value for role in record.roles)


def _numbers(limits: TenantLimits) -> tuple[int, int, int]:
    return limits.max_requests, limits.max_tokens, limits.max_cache_bytes


def _limit(number: int) -> str:
    return str(number) if number else "none"
