"""Laws of `StoreAdmin`, against stores made of dicts."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_gateway import FakeGateway
from fake_store import DISK, RAM, FakeStore, chunk_id
from fresh_process import modules_after

from spolia import errors
from spolia.store_admin import StoreAdmin
from spolia.store_results import ObjectName, VerifyProgress
from spolia.v1 import directory_pb2, kvstore_pb2

Stores = tuple[FakeStore, FakeStore]
NOWHERE = "127.0.0.1:1"


@pytest.fixture
def admin(stores: Stores) -> Iterator[StoreAdmin]:
    with StoreAdmin([store.address for store in stores], timeout_s=20) as admin:
        yield admin


@pytest.fixture
def half(stores: Stores) -> Iterator[StoreAdmin]:
    """The first store, and one that nobody answers for."""
    with StoreAdmin([NOWHERE, stores[0].address], timeout_s=20) as admin:
        yield admin


def test_an_object_at_several_stores_is_listed_once(admin: StoreAdmin, stores: Stores) -> None:
    first, second = stores
    first.put("aa", age_s=100, idle_s=50, hits=2, tiers=[DISK], pins={"a": 1500})
    second.put("aa", age_s=70, idle_s=60, hits=3, tiers=[RAM, DISK])
    second.put("aa", tenant="bloom")
    found, other = admin.list_objects().objects
    assert (found.tenant_id, other.tenant_id, found.chunk_id) == ("acme", "bloom", chunk_id("aa"))
    assert found.stores == (first.address, second.address)
    assert (found.tiers, found.age_s, found.idle_s, found.hits) == (("ram", "disk"), 100, 50, 5)
    assert [(pin.owner, pin.remaining_s) for pin in found.pins] == [("a", 1.5)]
    assert (found.kind, found.num_tokens, found.size_bytes) == ("local", 48, 250)
    assert [replica.codec for replica in found.replicas] == ["raw", "raw"]


def test_an_object_that_one_store_serves_is_served(admin: StoreAdmin, stores: Stores) -> None:
    stores[0].put("aa", state=kvstore_pb2.OBJECT_STATE_UNKNOWN_CODEC)
    stores[1].put("aa")
    stores[0].put("bb", state=kvstore_pb2.OBJECT_STATE_UNKNOWN_FORMAT)
    stores[0].put("cc", state=77)
    assert [found.state for found in admin.list_objects().objects] == ["served", "unknown_format", "unknown_77"]


def test_a_limit_never_hides_a_replica_of_what_it_leaves(admin: StoreAdmin, stores: Stores) -> None:
    for start in ("cc", "bb", "aa"):
        stores[0].put(start)
    stores[1].put("aa")
    (found,) = admin.list_objects(limit=1).objects
    assert (found.chunk_id, len(found.stores)) == (chunk_id("aa"), 2)


def test_a_limit_spares_the_stores_the_rest_and_no_odd_digit_is_lost(admin: StoreAdmin, stores: Stores) -> None:
    for start in ("cc", "aa", "ab"):
        stores[0].put(start)
    assert [found.chunk_id for found in admin.list_objects(limit=2).objects] == [chunk_id("aa"), chunk_id("ab")]
    assert [store.requests("List")[-1].limit for store in stores] == [2, 2]
    (found,) = admin.list_objects(id_prefix="c", limit=1).objects
    assert found.chunk_id == chunk_id("cc")
    assert stores[0].requests("List")[-1].limit == 0


def test_many_ids_are_found_with_few_questions(admin: StoreAdmin, stores: Stores) -> None:
    starts = [f"{number:04x}" for number in range(0x2000, 0x2100, 2)]
    for start in starts:
        stores[0].put(start)
    assert [one.chunk_id for one in admin.find(reversed(starts)).objects] == [chunk_id(s) for s in reversed(starts)]
    assert {request.id_prefix for request in stores[0].requests("List")} == {b"\x20"}


def test_of_an_error_in_on_progress_no_store_is_blamed(stores: Stores) -> None:
    def on_progress(_: VerifyProgress) -> None:
        raise errors.Busy("mine")

    stores[0].put("aa")
    with StoreAdmin([store.address for store in stores]) as admin:
        with pytest.raises(errors.Busy, match=r"^mine$"):
            admin.verify(on_progress=on_progress)
        with pytest.raises(errors.SpoliaError, match="closed"):
            admin.stats()


def test_a_store_that_hangs_leaves_a_download_time_for_the_next(
    admin: StoreAdmin, stores: Stores, tmp_path: Path
) -> None:
    stores[0].put("aa", tiers=[RAM])
    stores[1].put("aa", tiers=[DISK])
    (found,) = admin.list_objects().objects
    stores[0].hang = True
    got = admin.download(found, tmp_path / "it", timeout_s=2.0)
    assert got.store == stores[1].address
    assert isinstance(got.failed[stores[0].address], errors.DeadlineExceeded)
    with pytest.raises(errors.NotFound):
        admin.download(replace(found, replicas=()), tmp_path / "it")


@pytest.mark.parametrize(("prefix", "sent"), [("ab", "ab"), ("abc", "ab"), ("AB", "ab"), ("a", "")])
def test_a_prefix_may_end_in_half_a_byte(prefix: str, sent: str, admin: StoreAdmin, stores: Stores) -> None:
    for start in ("abcd", "ab0d", "ad"):
        stores[0].put(start)
    listed = [found.chunk_id.hex() for found in admin.list_objects(id_prefix=prefix).objects]
    assert listed == sorted(
        one.chunk_id.hex() for one in stores[0].objects.values() if one.chunk_id.hex().startswith(prefix.lower())
    )
    assert stores[0].requests("List")[0].id_prefix.hex() == sent


def test_a_unique_prefix_finds_its_object(admin: StoreAdmin, stores: Stores) -> None:
    stores[0].put("abcd1")
    stores[1].put("abcd2")
    stores[1].put("ef012")
    found = admin.find(["ef01", "abcd1", "abcd10"])
    assert [one.chunk_id for one in found.objects] == [chunk_id("ef012"), chunk_id("abcd1")]


def test_finding_many_asks_each_store_once(admin: StoreAdmin, stores: Stores) -> None:
    made = [stores[0].put(f"ab{index:02x}").chunk_id for index in range(60)]
    stores[0].put("cdef")
    assert [one.chunk_id for one in admin.find([one.hex() for one in made]).objects] == made
    (request,) = stores[0].requests("List")
    assert request.id_prefix.hex() == "ab"


def test_overlapping_prefixes_find_a_replica_once(admin: StoreAdmin, stores: Stores) -> None:
    stores[0].put("abcd12")
    (found,) = admin.find(["abcd", "abcd12"]).objects
    assert found.stores == (stores[0].address,)


def test_an_ambiguous_prefix_names_what_was_found(admin: StoreAdmin, stores: Stores) -> None:
    stores[0].put("abcd1")
    stores[1].put("abcd2")
    with pytest.raises(errors.InvalidRequest, match=r"abcd1.*abcd2"):
        admin.find(["abcd"])


def test_a_chunk_of_two_tenants_is_two_objects(admin: StoreAdmin, stores: Stores) -> None:
    stores[0].put("abcd")
    stores[1].put("abcd", tenant="bloom")
    with pytest.raises(errors.InvalidRequest, match="acme, bloom") as refused:
        admin.find(["abcd"])
    assert refused.value.field == "tenant"
    assert [one.tenant_id for one in admin.find(["abcd"], tenant_id="bloom").objects] == ["bloom"]


def test_an_id_that_no_store_holds_is_not_found(admin: StoreAdmin, half: StoreAdmin) -> None:
    with pytest.raises(errors.NotFound, match="no store holds an object abcd"):
        admin.find(["abcd"])
    with pytest.raises(errors.NotFound, match="none of the stores that answered"):
        half.find(["abcd"])


@pytest.mark.parametrize("wrong", ["abc", "xyzw", "a" * 65, "", 5])
def test_what_is_no_id_is_refused_before_anyone_is_asked(wrong: Any, admin: StoreAdmin, stores: Stores) -> None:
    with pytest.raises(errors.InvalidRequest) as refused:
        admin.find([wrong])
    assert refused.value.field == "id"
    assert not stores[0].asked


def test_a_store_that_is_away_is_named_and_left_out(half: StoreAdmin, stores: Stores) -> None:
    stores[0].put("aa")
    listing = half.list_objects()
    assert len(listing.objects) == 1
    assert isinstance(listing.failed[NOWHERE], errors.Unavailable)
    assert NOWHERE in listing.failed[NOWHERE].message
    stats = half.stats()
    assert (list(stats.answers), list(stats.failed)) == ([stores[0].address], [NOWHERE])


def test_when_no_store_answers_the_first_error_is_raised(admin: StoreAdmin, stores: Stores) -> None:
    stores[0].failure = errors.Busy("full", field="f", retry_after_ms=5)
    stores[1].failure = errors.Unavailable("away")
    with pytest.raises(errors.Busy) as raised:
        admin.stats()
    assert raised.value.message == f"store {stores[0].address}: full"
    assert (raised.value.field, raised.value.retry_after_ms) == ("f", 5)


def test_stores_of_a_cluster_are_its_kvstore_nodes(gateway: FakeGateway, stores: Stores) -> None:
    with pytest.raises(errors.Unavailable, match="no kvstore node"):
        StoreAdmin.of_cluster(gateway.address)
    gateway.more_nodes += [
        directory_pb2.NodeRecord(node_id=store.node_id, role=directory_pb2.NODE_ROLE_KVSTORE, address=store.address)
        for store in stores
    ]
    with StoreAdmin.of_cluster(gateway.address) as admin:
        assert admin.addresses == tuple(store.address for store in stores)


def test_a_download_comes_from_the_fastest_tier(admin: StoreAdmin, stores: Stores, tmp_path: Path) -> None:
    stores[0].put("abcd", tiers=[DISK])
    made = stores[1].put("abcd", tiers=[RAM])
    (found,) = admin.find(["abcd"]).objects
    got = admin.download(found, tmp_path / "it")
    assert (got.store, got.tier, got.size_bytes, dict(got.failed)) == (stores[1].address, "ram", 250, {})
    assert (tmp_path / "it").read_bytes() == made.data
    assert stores[1].requests("Get")[0].ignore_cost
    assert not stores[0].requests("Get")


@pytest.mark.parametrize("damage", ["frame", "whole", "short", "gap", "excess", "found"])
def test_a_damaged_copy_is_never_written(damage: str, stores: Stores, tmp_path: Path) -> None:
    stores[0].put("abcd")
    stores[0].damage = damage
    (tmp_path / "it").write_text("before")
    with StoreAdmin([stores[0].address]) as admin:
        (found,) = admin.find(["abcd"]).objects
        with pytest.raises(errors.DataCorrupt, match=chunk_id("abcd").hex()):
            admin.download(found, tmp_path / "it")
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
    assert (tmp_path / "it").read_text() == "before"


def test_a_good_copy_is_found_behind_a_damaged_one(admin: StoreAdmin, stores: Stores, tmp_path: Path) -> None:
    stores[0].put("abcd")
    stores[0].damage = "frame"
    stores[1].put("abcd", tiers=[DISK])
    (found,) = admin.find(["abcd"]).objects
    got = admin.download(found, tmp_path / "it")
    assert (got.store, got.tier) == (stores[1].address, "disk")
    assert isinstance(got.failed[stores[0].address], errors.DataCorrupt)


def test_an_object_that_has_gone_is_not_found(admin: StoreAdmin, stores: Stores, tmp_path: Path) -> None:
    stores[0].put("abcd")
    (found,) = admin.find(["abcd"]).objects
    stores[0].objects.clear()
    with pytest.raises(errors.NotFound, match="not found"):
        admin.download(found, tmp_path / "it")


@pytest.mark.parametrize("out", ["no/such/folder/it", "."])
def test_a_file_that_cannot_be_written_is_the_callers_to_fix(
    out: str, admin: StoreAdmin, stores: Stores, tmp_path: Path
) -> None:
    stores[0].put("abcd")
    stores[1].put("abcd")
    (found,) = admin.find(["abcd"]).objects
    with pytest.raises(errors.InvalidRequest) as refused:
        admin.download(found, tmp_path / out)
    assert refused.value.field == "out"


def test_without_xxhash_a_download_says_which_extra_is_missing(
    admin: StoreAdmin, stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores[0].put("abcd")
    (found,) = admin.find(["abcd"]).objects
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(errors.InvalidRequest, match=r"pip install 'spolia\[node\]'"):
        admin.download(found, tmp_path / "it")
    assert not list(tmp_path.iterdir())
    assert not stores[0].requests("Get")


def test_deleting_reaches_every_store_and_counts_there(admin: StoreAdmin, stores: Stores) -> None:
    stores[0].put("aa", tiers=[RAM, DISK])
    stores[1].put("aa")
    stores[1].put("aa", tenant="bloom")
    dropped = admin.delete([ObjectName("acme", chunk_id("aa")), ObjectName("bloom", chunk_id("aa"))])
    first, second = dropped.answers.values()
    assert (first.num_objects, first.num_bytes, dict(first.copies)) == (1, 250, {"ram": 1, "disk": 1})
    assert (second.num_objects, second.num_bytes) == (2, 500)
    assert not stores[0].objects
    assert not stores[1].objects


def test_no_request_names_more_ids_than_a_message_takes(admin: StoreAdmin, stores: Stores) -> None:
    admin.delete([ObjectName("acme", index.to_bytes(32, "big")) for index in range(5000)])
    assert [len(request.chunk_ids) for request in stores[0].requests("Delete")] == [4096, 904]


def test_pins_are_made_where_the_object_is(admin: StoreAdmin, stores: Stores) -> None:
    stores[1].put("aa")
    name = ObjectName("acme", chunk_id("aa"))
    pinned = admin.pin([name], lease_s=90.5)
    assert dict(pinned.answers) == {stores[0].address: (), stores[1].address: (name,)}
    (request,) = stores[1].requests("Pin")
    assert (request.owner, request.lease_ms) == ("operator", 90_500)


@pytest.mark.parametrize("lease_s", [0, 3601, float("nan"), "1h"])
def test_a_lease_beyond_the_stores_limit_is_refused(lease_s: Any, admin: StoreAdmin, stores: Stores) -> None:
    with pytest.raises(errors.InvalidRequest) as refused:
        admin.pin([ObjectName("acme", chunk_id("aa"))], lease_s=lease_s)
    assert refused.value.field == "lease_s"
    assert not stores[0].asked


def test_unpinning_ends_the_owners_pins_alone(admin: StoreAdmin, stores: Stores) -> None:
    made = stores[0].put("aa", pins={"operator": 1000, "node-1": 1000})
    ended = admin.unpin([ObjectName("acme", chunk_id("aa"))])
    assert list(ended.answers.values()) == [1, 0]
    assert list(made.pins) == ["node-1"]


def test_verify_sums_over_tenants_and_counts_a_damaged_copy_once(admin: StoreAdmin, stores: Stores) -> None:
    stores[0].put("aa", tiers=[RAM, DISK])
    stores[0].damaged = [
        kvstore_pb2.DamagedCopy(tenant_id="acme", chunk_id=chunk_id("aa"), tier=DISK, reason="layer 3")
    ]
    seen: list[VerifyProgress] = []
    verified = admin.verify(on_progress=seen.append).answers[stores[0].address]
    assert (verified.num_checked, verified.bytes_checked) == (2, 20)
    assert [(copy.tier, copy.reason) for copy in verified.damaged] == [("disk", "layer 3")]
    mine = [progress for progress in seen if progress.store == stores[0].address]
    assert [(progress.verified.num_checked, progress.num_total) for progress in mine] == [(1, 2), (2, 2)]
    names = [ObjectName("acme", chunk_id("aa")), ObjectName("bloom", chunk_id("aa"))]
    assert admin.verify(names).answers[stores[0].address].num_checked == 4


def test_a_verify_that_ends_too_soon_is_an_error(admin: StoreAdmin, stores: Stores) -> None:
    stores[0].dies_in_verify = True
    verified = admin.verify()
    assert list(verified.answers) == [stores[1].address]
    assert isinstance(verified.failed[stores[0].address], errors.Unavailable)


def test_what_progress_raises_is_raised(admin: StoreAdmin, stores: Stores) -> None:
    def fail(progress: VerifyProgress) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        admin.verify(on_progress=fail)


def test_collect_passes_on_what_was_asked(admin: StoreAdmin, stores: Stores) -> None:
    stores[0].collected = kvstore_pb2.CollectResponse(orphan_files=2, orphan_bytes=9, dropped_objects=1)
    collected = admin.collect(drop_unknown=True, idle_s=60, dry_run=True)
    assert collected.answers[stores[0].address].orphan_files == 2
    (request,) = stores[1].requests("Collect")
    assert (request.drop_unknown, request.idle_s, request.dry_run) == (True, 60, True)


def test_a_store_that_hangs_costs_the_time_limit_and_no_more(admin: StoreAdmin, stores: Stores) -> None:
    stores[0].hang = True
    stats = admin.stats(timeout_s=2.0)
    assert list(stats.answers) == [stores[1].address]
    assert isinstance(stats.failed[stores[0].address], errors.DeadlineExceeded)


def test_closing_ends_a_call_under_way(admin: StoreAdmin, stores: Stores) -> None:
    stores[0].hang = stores[1].hang = True
    threading.Timer(0.2, admin.close).start()
    with pytest.raises(errors.Cancelled):
        admin.stats()


def test_a_closed_admin_refuses_calls(admin: StoreAdmin) -> None:
    admin.close()
    admin.close()
    with pytest.raises(errors.InvalidRequest, match="closed"):
        admin.list_objects()


@pytest.mark.parametrize("wrong", [[], ["nonsense"], "127.0.0.1:1", [5]])
def test_an_address_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(errors.InvalidRequest):
        StoreAdmin(wrong)


def test_the_admin_needs_grpc_and_protobuf_only() -> None:
    loaded = modules_after("import spolia.store_admin")
    assert not loaded & {"torch", "typer", "rich", "blake3", "xxhash", "numpy", "structlog"}
    assert not {name for name in loaded if name.startswith("spolia_") and not name.startswith("spolia_core")}


def test_unknown_members_stay_readable(admin: StoreAdmin, stores: Stores) -> None:
    stores[0].put("aa", tiers=[RAM, 9])
    (found,) = admin.list_objects().objects
    assert found.tiers == ("ram", "unknown_9")
