"""The SQLite index: what it keeps, what it forgets, what it refuses."""

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from kvstore_worlds import TENANT, make_record

from spolia_kvstore.index import MAX_VARIABLES, IndexUnusable, SqliteIndex, Totals
from spolia_kvstore.objects import Tier


def test_a_row_comes_back_as_it_was_put() -> None:
    index = SqliteIndex()
    record = replace(make_record(1, 10), replica="node/1")
    index.put(record, Tier.RAM, 5.0)
    (row,) = index.lookup(TENANT, [record.key.chunk_id]).values()
    assert (row.record, row.tier, row.stored_at, row.used_at, row.hits) == (record, Tier.RAM, 5.0, 5.0, 0)


def test_another_tenants_rows_are_not_found() -> None:
    index = SqliteIndex()
    record = make_record(1, 10, tenant_id="other")
    index.put(record, Tier.RAM, 0.0)
    assert index.lookup(TENANT, [record.key.chunk_id]) == {}
    assert index.list_tenant(TENANT, 10) == []


def test_lookup_takes_more_ids_than_one_statement() -> None:
    index = SqliteIndex()
    records = [make_record(number, 10) for number in range(MAX_VARIABLES + 7)]
    for record in records:
        index.put(record, Tier.RAM, 0.0)
    ids = [record.key.chunk_id for record in records]
    assert set(index.lookup(TENANT, ids)) == set(ids)


def test_the_fastest_tier_is_named_when_there_are_several() -> None:
    index = SqliteIndex()
    record = make_record(1, 10)
    for tier in (Tier.RAM, Tier.DISK):
        index.put(record, tier, 0.0)
    assert index.lookup(TENANT, [record.key.chunk_id])[record.key.chunk_id].tier is Tier.RAM
    index.remove([record.key], Tier.RAM)
    assert index.lookup(TENANT, [record.key.chunk_id])[record.key.chunk_id].tier is Tier.DISK


def test_hits_are_counted_and_the_list_is_by_recency() -> None:
    index = SqliteIndex()
    first, second = make_record(1, 10), make_record(2, 20)
    for when, record in enumerate((first, second)):
        index.put(record, Tier.RAM, float(when))
    assert [row.record for row in index.list_tenant(TENANT, 10)] == [second, first]
    index.record_hits([first.key, first.key], 7.0)
    (row,) = index.list_tenant(TENANT, 1)
    assert (row.record, row.hits, row.used_at) == (first, 2, 7.0)


def test_totals_count_a_tier() -> None:
    index = SqliteIndex()
    assert index.totals(Tier.RAM) == Totals(0, 0)
    for number, size in ((1, 10), (2, 20)):
        index.put(make_record(number, size), Tier.RAM, 0.0)
    assert index.totals(Tier.RAM) == Totals(2, 30)
    assert index.totals(Tier.DISK) == Totals(0, 0)


def test_rows_of_memory_do_not_survive_the_process_and_rows_of_disk_do(tmp_path: Path) -> None:
    path = str(tmp_path / "index.db")
    index = SqliteIndex(path)
    index.put(make_record(1, 10), Tier.RAM, 0.0)
    index.put(make_record(2, 20), Tier.DISK, 0.0)
    index.close()
    index = SqliteIndex(path)
    assert [row.record for row in index.list_tenant(TENANT, 10)] == [make_record(2, 20)]
    index.close()


def test_two_stores_cannot_share_a_file(tmp_path: Path) -> None:
    path = str(tmp_path / "index.db")
    first = SqliteIndex(path)
    with pytest.raises(IndexUnusable, match="locked"):
        SqliteIndex(path)
    first.close()


def test_a_file_of_another_release_or_another_kind_is_refused(tmp_path: Path) -> None:
    newer, foreign = tmp_path / "newer.db", tmp_path / "foreign.db"
    database = sqlite3.connect(newer)
    database.execute("PRAGMA user_version = 99")
    database.close()
    foreign.write_bytes(b"not a database at all" * 100)
    with pytest.raises(IndexUnusable, match="schema 99"):
        SqliteIndex(str(newer))
    with pytest.raises(IndexUnusable, match="not a database"):
        SqliteIndex(str(foreign))
