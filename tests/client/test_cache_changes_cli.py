"""Laws of what `spolia cache` changes at stores: rm, pin, gc, forget; against stores made of dicts."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from cache_runs import Stores, rows
from cli_runs import Spolia
from fake_gateway import FakeGateway
from fake_store import DISK, RAM

from spolia.v1 import kvstore_pb2


@pytest.mark.parametrize(
    "command", ["get abcd --out it", "rm abcd --yes", "pin abcd --for 1m", "verify abcd", "stat abcd"]
)
def test_an_id_names_one_object_or_nothing_is_done(command: str, cache: Spolia, stores: Stores) -> None:
    argv = command.split()
    unknown = cache(*argv)
    assert (unknown.code, unknown.out) == (1, "")
    assert "no store holds an object abcd" in unknown.err
    stores[0].put("abcd1")
    stores[1].put("abcd2")
    ambiguous = cache(*argv)
    assert (ambiguous.code, ambiguous.out) == (2, "")
    assert "abcd1" in ambiguous.err
    assert "abcd2" in ambiguous.err
    assert {method for store in stores for method, _ in store.asked} == {"List"}


def test_rm_drops_at_all_stores_and_counts(cache: Spolia, stores: Stores) -> None:
    for store in stores:
        store.put("abcd", tiers=[RAM, DISK])
        store.put("ef01", tenant="bloom")
    done = cache("rm", "abcd", "ef01", "--yes", "--json")
    assert done.json["total"] == {"num_objects": 4, "num_bytes": 1000, "copies": {"ram": 4, "disk": 2}}
    assert [store["num_objects"] for store in done.json["stores"]] == [2, 2]
    assert [name["tenant_id"] for name in done.json["objects"]] == ["acme", "bloom"]
    assert not stores[0].objects
    assert not stores[1].objects


@pytest.mark.parametrize(("answer", "is_left"), [("y\n", False), ("n\n", True), ("", True)])
def test_rm_asks_first(
    answer: str, is_left: bool, cache: Spolia, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    stores[0].put("abcd")
    done = cache("rm", "abcd")
    assert "drop 1 object (abcd00000000; 250 B at all stores)?" in done.err
    assert bool(stores[0].objects) == is_left
    assert (done.code != 0) == is_left


def test_rm_refuses_what_is_pinned_unless_forced(cache: Spolia, stores: Stores) -> None:
    stores[0].put("abcd")
    stores[1].put("abcd", pins={"node-1": 60_000})
    stores[1].put("ef01")
    done = cache("rm", "ef01", "abcd", "--yes")
    assert (done.code, done.out) == (2, "")
    assert "abcd00000000 by node-1 for 1m" in done.err
    assert len(stores[1].objects) == 2
    assert cache("rm", "abcd", "--yes", "--force").code == 0
    assert len(stores[1].objects) == 1


def test_pin_says_where_it_pinned(cache: Spolia, stores: Stores) -> None:
    stores[1].put("abcd")
    (line,) = rows(cache("pin", "abcd", "--for", "10m", "--owner", "me"))
    assert line.split() == ["acme", "abcd00000000", stores[1].address]
    (request,) = stores[1].requests("Pin")
    assert (request.owner, request.lease_ms) == ("me", 600_000)
    (one,) = cache("pin", "abcd", "--for", "30s", "--json").json["objects"]
    assert (one["pinned_at"], one["owner"], one["lease_s"]) == ([stores[1].address], "operator", 30.0)


@pytest.mark.parametrize("duration", ["2h", "0s"])
def test_pin_names_its_flag_and_how_long_it_may_be(duration: str, cache: Spolia) -> None:
    said = cache("pin", "abcd", "--for", duration).err
    assert f"--for must be at least 0.001s and at most 1h, got {duration}" in said
    assert "lease_s" not in said


def test_pin_with_end_ends_the_owners_pins(cache: Spolia, stores: Stores) -> None:
    made = stores[0].put("abcd", pins={"operator": 1000, "me": 1000})
    assert cache("pin", "--end", "abcd", "--json").json["num_unpinned"] == 1
    assert list(made.pins) == ["me"]


def test_gc_sums_over_stores(cache: Spolia, stores: Stores) -> None:
    stores[0].collected = kvstore_pb2.CollectResponse(orphan_files=2, orphan_bytes=2048, lost_rows=1)
    stores[1].collected = kvstore_pb2.CollectResponse(orphan_files=1, dropped_objects=5, dropped_bytes=10)
    done = cache("gc", "--dry-run", "--idle", "7d", "--drop-unknown")
    assert rows(done)[-1].split() == ["all", "3", "2.0", "KiB", "1", "0", "0", "B", "5", "10", "B"]
    assert "nothing was changed" in done.err
    (request,) = stores[0].requests("Collect")
    assert (request.drop_unknown, request.idle_s, request.dry_run) == (True, 7 * 86400, True)
    answer = cache("gc", "--json").json
    assert (answer["dry_run"], answer["total"]["orphan_files"], answer["total"]["dropped_objects"]) == (False, 3, 5)
    assert [store["lost_rows"] for store in answer["stores"]] == [1, 0]


def test_forget_says_which_chunks_stay(cache: Spolia) -> None:
    told = " ".join(cache("forget", "--help").out.split())
    assert all(words in told for words in ("prefix chunks", "linked chunks", "ages out"))


def test_forget_names_documents_by_their_text(cache: Spolia, gateway: FakeGateway, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("aa")
    (tmp_path / "b.md").write_text("bbb")
    report = cache("forget", str(tmp_path), "--json").json
    assert (report["num_documents"], report["num_stored_dropped"], report["stored_bytes_dropped"]) == (2, 2, 200)
    assert report["stored_tiers"] == [{"tier": "disk", "num_objects": 2, "num_bytes": 200}]
    assert [document.text for document in gateway.requests[0].documents] == ["aa", "bbb"]
    (line,) = rows(cache("forget", str(tmp_path / "a.md")))
    assert line.split() == ["1", "1", "100", "B", "disk", "1", "1"]
