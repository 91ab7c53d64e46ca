"""The catalog: what it keeps, what it forgets, what it refuses."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from kvstore_worlds import TENANT, make_record

from spolia_kvstore.catalog import MAX_VARIABLES, Catalog, Totals
from spolia_kvstore.catalog_file import CatalogUnusable
from spolia_kvstore.catalog_leases import Lease
from spolia_kvstore.catalog_row import Row
from spolia_kvstore.objects import ObjectKey, Tier
from spolia_kvstore.usage import Usage

HALF_LIFE_S = 900.0


@pytest.fixture
def catalog() -> Iterator[Catalog]:
    opened = Catalog(half_life_s=HALF_LIFE_S)
    yield opened
    opened.close()


def a_row(number: int, size: int = 10, tenant_id: str = TENANT, tier: Tier = Tier.DISK, used_at: float = 0.0) -> Row:
    digests = (bytes([number % 256]) * 16, b"d" * 16)
    return Row(make_record(number, size, tenant_id), tier, Usage(0.0, used_at), digests, f"file-{number}")


def numbers_of(rows: Iterator[Row] | list[Row]) -> list[int]:
    return [int.from_bytes(row.record.key.chunk_id, "big") for row in rows]


def test_a_row_comes_back_as_it_was_put(catalog: Catalog) -> None:
    record = replace(make_record(1, 10), replica="node/1", compute_s=0.25)
    row = Row(record, Tier.DISK, Usage(1.5, 2.5, 0.5, 3, -4.5), (b"a" * 16, b"b" * 16), "file")
    catalog.put(row)
    assert catalog.lookup(TENANT, [record.key.chunk_id]) == {record.key.chunk_id: row}


def test_another_tenants_rows_are_not_found(catalog: Catalog) -> None:
    row = a_row(1, tenant_id="other")
    catalog.put(row)
    assert catalog.lookup(TENANT, [row.record.key.chunk_id]) == {}
    assert list(catalog.rows(Tier.DISK, TENANT)) == []


def test_lookup_takes_more_ids_than_one_statement(catalog: Catalog) -> None:
    rows = [a_row(number) for number in range(MAX_VARIABLES + 7)]
    catalog.put_many(rows)
    ids = [row.record.key.chunk_id for row in rows]
    assert set(catalog.lookup(TENANT, ids)) == set(ids)


def test_the_fastest_tier_is_named_when_there_are_several(catalog: Catalog) -> None:
    key = a_row(1).record.key
    for tier in (Tier.DISK, Tier.RAM):
        catalog.put(a_row(1, tier=tier))
    assert catalog.lookup(TENANT, [key.chunk_id])[key.chunk_id].tier is Tier.RAM
    assert [row.tier for row in catalog.lookup_all(TENANT, [key.chunk_id])[key.chunk_id]] == [Tier.RAM, Tier.DISK]
    catalog.remove([key], Tier.RAM)
    assert catalog.lookup(TENANT, [key.chunk_id])[key.chunk_id].tier is Tier.DISK


def test_rows_come_in_the_order_of_their_keys_one_tenants_or_all(catalog: Catalog) -> None:
    numbers = [*range(1, 1202), 2 << 240, (2 << 240) + 1]  # more than one page; two ids begin with a byte of their own
    catalog.put_many(a_row(number) for number in numbers)
    catalog.put_many([a_row(7, tenant_id="a"), a_row(2 << 240, tenant_id="z"), a_row(8, tier=Tier.RAM)])
    assert numbers_of(catalog.rows(Tier.DISK, TENANT)) == numbers
    assert numbers_of(catalog.rows(Tier.DISK)) == [7, *numbers, 2 << 240]
    prefix = (2 << 240).to_bytes(32, "big")[:2]
    assert numbers_of(catalog.rows(Tier.DISK, TENANT, prefix)) == numbers[-2:]
    assert numbers_of(catalog.rows(Tier.DISK, "", prefix)) == [*numbers[-2:], 2 << 240]
    assert numbers_of(catalog.rows(Tier.DISK, "nobody")) == []


def test_rows_may_change_while_they_are_walked(catalog: Catalog) -> None:
    catalog.put_many(a_row(number) for number in range(1500))
    walk = catalog.rows(Tier.DISK)
    next(walk)
    catalog.remove([a_row(number).record.key for number in range(1200, 1500)], Tier.DISK)
    assert numbers_of(walk) == list(range(1, 1200))


def test_the_lowest_are_ordered_by_rank_also_after_a_use(catalog: Catalog) -> None:
    catalog.put_many(a_row(number, used_at=100.0 * number) for number in (3, 1, 2))
    catalog.put(a_row(4, tenant_id="other", used_at=150.0))
    assert numbers_of(catalog.lowest(Tier.DISK, 0, 10)) == [1, 4, 2, 3]
    assert numbers_of(catalog.lowest(Tier.DISK, 1, 2)) == [4, 2]
    assert numbers_of(catalog.lowest_of_tenant(Tier.DISK, TENANT, 0, 2)) == [1, 2]
    assert numbers_of(catalog.lowest_of_tenant(Tier.DISK, TENANT, 2, 2)) == [3]
    used = a_row(1).usage.used(1000.0, HALF_LIFE_S, is_hit=True)
    catalog.set_usage([(a_row(1).record.key, used)])
    assert numbers_of(catalog.lowest(Tier.DISK, 0, 10)) == [4, 2, 3, 1]
    (row,) = catalog.lookup(TENANT, [a_row(1).record.key.chunk_id]).values()
    assert row.usage == used


def test_another_half_life_orders_all_rows_anew(tmp_path: Path) -> None:
    path = str(tmp_path / "index.db")
    often = Row(make_record(1, 10), Tier.DISK, Usage(0.0, 0.0, log_uses=3.0))
    late = Row(make_record(2, 10), Tier.DISK, Usage(0.0, 100.0))
    for half_life_s, lowest in ((10.0, [1, 2]), (1000.0, [2, 1]), (1000.0, [2, 1]), (10.0, [1, 2])):
        catalog = Catalog(path, half_life_s)
        if not catalog.totals(Tier.DISK).num_objects:
            catalog.put_many([often, late])
        assert numbers_of(catalog.lowest(Tier.DISK, 0, 10)) == lowest
        catalog.close()


def test_totals_count_a_tier_and_its_tenants(catalog: Catalog) -> None:
    assert catalog.totals(Tier.DISK) == Totals(0, 0)
    catalog.put_many([a_row(1, 10), a_row(2, 20), a_row(1, 5, "other"), a_row(3, 7, tier=Tier.RAM)])
    assert catalog.totals(Tier.DISK) == Totals(3, 35)
    assert catalog.totals_by_tenant(Tier.DISK) == {TENANT: Totals(2, 30), "other": Totals(1, 5)}


def test_a_transaction_that_fails_leaves_nothing(catalog: Catalog) -> None:
    bad = replace(a_row(2), record=replace(a_row(2).record, digest=None))  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(sqlite3.IntegrityError):
        catalog.put_many([a_row(1), bad])
    assert catalog.totals(Tier.DISK) == Totals()
    catalog.put(a_row(1))


def test_leases_outlive_the_process_until_they_run_out(tmp_path: Path) -> None:
    path, key = str(tmp_path / "index.db"), ObjectKey(TENANT, bytes(32))
    catalog = Catalog(path)
    catalog.pins.put([Lease(key, "a", 10.0), Lease(key, "b", 30.0)])
    catalog.claims.put([Lease(key, "a", 10.0)])
    catalog.claims.put([Lease(key, "b", 20.0)])
    catalog.close()
    catalog = Catalog(path)
    assert catalog.claims.standing(5.0) == [Lease(key, "b", 20.0)], "one owner of a claim"
    assert catalog.pins.standing(10.0) == [Lease(key, "b", 30.0)]
    catalog.pins.remove([(key, "nobody")])
    assert catalog.pins.standing(0.0) == [Lease(key, "b", 30.0)], "what ran out was forgotten for good"
    catalog.pins.remove([(key, "b")])
    assert catalog.pins.standing(0.0) == []
    catalog.close()


def test_numbers_never_come_twice_in_the_life_of_a_file(tmp_path: Path) -> None:
    path, given = str(tmp_path / "index.db"), []
    for _ in range(2):
        catalog = Catalog(path)
        given += [catalog.next_number("session") for _ in range(3)]
        catalog.close()
    assert given == [1, 2, 3, 4, 5, 6]


def test_members_outlive_the_process(tmp_path: Path) -> None:
    path = str(tmp_path / "index.db")
    catalog = Catalog(path)
    catalog.members.put("a", 1, b"old")
    catalog.members.put("a", 2, b"new")
    catalog.members.put("b", 1, b"gone")
    catalog.members.put("c", 1, b"never had a lease")
    for node_id, until in (("a", 5.0), ("b", 5.0), ("a", 6.0)):
        catalog.members.renew(node_id, until)
    catalog.members.remove("b")
    catalog.close()
    catalog = Catalog(path)
    assert catalog.members.all() == [("a", 2, b"new", 6.0)]
    catalog.close()


def test_rows_of_memory_do_not_survive_the_process_and_rows_of_disk_do(tmp_path: Path) -> None:
    path = str(tmp_path / "index.db")
    catalog = Catalog(path)
    catalog.put_many([a_row(1, tier=Tier.RAM), a_row(2)])
    catalog.sync()
    catalog.close()
    catalog.close()
    catalog = Catalog(path)
    assert (numbers_of(catalog.rows(Tier.DISK)), catalog.totals(Tier.RAM)) == ([2], Totals())
    catalog.close()


def test_two_stores_cannot_share_a_file_and_the_second_harms_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "index.db")
    first = Catalog(path)
    with pytest.raises(CatalogUnusable, match="locked"):
        Catalog(path)
    first.put(a_row(1))
    first.close()
    Catalog(path).close()


def test_a_file_of_another_release_is_refused_and_one_of_another_kind_is_damaged(tmp_path: Path) -> None:
    newer, foreign = tmp_path / "newer.db", tmp_path / "foreign.db"
    database = sqlite3.connect(newer)
    database.execute("PRAGMA user_version = 99")
    database.close()
    foreign.write_bytes(b"not a database at all" * 100)
    with pytest.raises(CatalogUnusable, match="schema 99"):
        Catalog(str(newer))
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        Catalog(str(foreign))


def test_an_overwritten_page_is_found_by_opening_or_by_the_check(tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    catalog = Catalog(str(path))
    catalog.put_many(a_row(number) for number in range(30))
    catalog.check()
    catalog.close()
    whole = path.read_bytes()
    for start in range(0, len(whole), 4096):
        path.write_bytes(whole[:start] + b"\xff" * 4096 + whole[start + 4096 :])
        with pytest.raises(sqlite3.DatabaseError):
            Catalog(str(path)).check()
    path.write_bytes(whole)
    catalog = Catalog(str(path))
    catalog.check()
    assert catalog.totals(Tier.DISK).num_objects == 30
    catalog.close()
