"""Quotas: a tenant that is full loses its own objects, never another's."""

from __future__ import annotations

from pathlib import Path

import pytest
from kvstore_worlds import TENANT, key_of, make_chunk
from tier_worlds import CHUNK_BYTES, World, open_world

from spolia_core.errors import Busy, InvalidRequest
from spolia_kvstore.catalog import Totals
from spolia_kvstore.quotas import Quota, Tenants, read_quotas

CHUNKS = [make_chunk(number) for number in range(1, 7)]
TWO_OBJECTS = Quota(num_objects=2)
TWO_CHUNKS_OF_BYTES = Quota(num_bytes=2 * CHUNK_BYTES + 1)


def held(world: World) -> dict[str, int]:
    return {tenant_id: totals.num_objects for tenant_id, totals in world.store.tenants.held().items()}


@pytest.mark.parametrize("quota", [TWO_OBJECTS, TWO_CHUNKS_OF_BYTES])
async def test_a_tenant_over_its_quota_loses_its_own_lowest_ranked_objects(quota: Quota) -> None:
    async with open_world(num_in_memory=9, quotas={TENANT: quota}) as world:
        await world.put(*CHUNKS[:3], tenant_id="other")
        await world.put(*CHUNKS[:2])
        world.clock.now += 10.0
        await world.get(CHUNKS[0])
        await world.put(CHUNKS[2])
        assert world.where(*CHUNKS[:3]) == ["RAM", "", "RAM"]
        assert held(world) == {"other": 3, TENANT: 2}
        assert world.tiers.counters.evictions == 1


async def test_a_quota_is_over_all_tiers_and_counts_an_object_once(tmp_path: Path) -> None:
    async with open_world(tmp_path, default_quota=Quota(num_objects=3)) as world:
        await world.put(CHUNKS[0], durable=True)
        await world.put_on_disk_only(CHUNKS[1])
        await world.put(CHUNKS[2])
        assert (held(world), world.where(*CHUNKS[:3])) == ({TENANT: 3}, ["RAM+DISK", "DISK", "RAM"])
        await world.put(CHUNKS[3])
        assert world.where(*CHUNKS[:4]) == ["", "DISK", "RAM", "RAM"]
        await world.put(CHUNKS[4], durable=True)
        assert world.where(*CHUNKS[:5]) == ["", "", "RAM", "RAM", "RAM+DISK"]
        assert [found.path for found in world.disk.files.scan()] == [world.file_of(CHUNKS[4])]


async def test_what_is_pinned_or_read_does_not_go_and_the_refusal_names_the_quota() -> None:
    async with open_world(quotas={TENANT: TWO_OBJECTS}) as world:
        await world.put(*CHUNKS[:2])
        world.store.pin([key_of(CHUNKS[0])], "me", 60.0)
        stored = world.ram.find(key_of(CHUNKS[1]))
        assert stored is not None
        world.ram.open(stored)
        with pytest.raises(Busy) as caught:
            await world.put(CHUNKS[2])
        world.ram.close(stored)
        assert (caught.value.field, caught.value.limit) == ("tenant_id", "2 objects")
        assert caught.value.retry_after_ms > 0
        assert world.where(*CHUNKS[:3]) == ["RAM", "RAM", ""]
        await world.put(CHUNKS[2])
        assert world.where(*CHUNKS[:3]) == ["RAM", "", "RAM"]


async def test_however_many_are_pinned_the_lowest_that_is_not_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spolia_kvstore.disk_rows.ROWS_AT_ONCE", 2)
    async with open_world(tmp_path, default_quota=Quota(num_objects=5)) as world:
        await world.put_on_disk_only(*CHUNKS[:4])
        await world.put(CHUNKS[4])
        for chunk in CHUNKS[:3]:
            world.store.pins.pin([key_of(chunk)], "me", 60.0)  # which is no use of it
        await world.put(CHUNKS[5])
        assert world.where(*CHUNKS) == ["DISK", "DISK", "DISK", "", "RAM", "RAM"]


async def test_an_object_larger_than_the_quota_is_refused_by_name_and_costs_nothing() -> None:
    quota = Quota(num_bytes=CHUNK_BYTES)
    large = make_chunk(9, num_tokens=16)
    async with open_world(quotas={TENANT: quota}) as world:
        await world.put(CHUNKS[0])
        with pytest.raises(Busy, match=f"'{TENANT}'") as caught:
            await world.put(large)
        assert (caught.value.limit, caught.value.retry_after_ms) == (f"{CHUNK_BYTES} bytes", 0)
        assert world.where(CHUNKS[0]) == ["RAM"]
        await world.put(large, tenant_id="other")


async def test_a_tenant_over_a_quota_that_was_lowered_comes_down_at_its_next_put(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put_on_disk_only(*CHUNKS[:5])
        clock = world.clock
    async with open_world(tmp_path, clock=clock, default_quota=TWO_OBJECTS) as world:
        assert held(world) == {TENANT: 5}
        await world.put(CHUNKS[5])
        assert world.where(*CHUNKS) == ["", "", "", "", "DISK", "RAM"]


async def test_a_quota_is_no_reservation_other_tenants_evict_by_rank_alone() -> None:
    async with open_world(num_in_memory=2, default_quota=TWO_OBJECTS) as world:
        await world.put(*CHUNKS[:2], tenant_id="a")
        await world.put(CHUNKS[0], tenant_id="b")
        assert held(world) == {"a": 1, "b": 1}


def test_excess_is_what_must_go_before_one_more_fits() -> None:
    tenants = Tenants(Quota(num_bytes=100, num_objects=2), {"big": Quota()})
    for tenant_id in ("a", "big"):
        tenants.add(tenant_id, 60)
        tenants.add(tenant_id, 30)
    assert tenants.excess("a", 10) == Totals(1, 0)
    assert tenants.excess("a", 50) == Totals(1, 40)
    assert tenants.excess("nobody", 100) == tenants.excess("big", 10**9) == Totals()
    tenants.add("a", -60, -1)
    assert tenants.excess("a", 70) == Totals()
    tenants.add("a", -30, -1)
    assert tenants.held() == {"big": Totals(2, 90)}


def test_quotas_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "quotas.toml"
    path.write_text('[a]\nbytes = 10\nobjects = 2\n\n["b c"]\nbytes = 5\n\n[d]\n')
    assert read_quotas(path) == {"a": Quota(10, 2), "b c": Quota(5, 0), "d": Quota()}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[a\n", "line 1"),
        ("[a]\nbytes = -1\n", r"\[a\]"),
        ("[a]\nbytes = true\n", r"\[a\]"),
        ('[a]\nbytes = "1"\n', r"\[a\]"),
        ("[a]\nbites = 1\n", r"\[a\]"),
        ("a = 1\n", r"\[a\]"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_wrong_is_refused_and_says_where(tmp_path: Path, text: str | None, what: str) -> None:
    path = tmp_path / "quotas.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidRequest, match=what) as caught:
        read_quotas(path)
    assert caught.value.field == "quotas_file"
    assert str(path) in caught.value.message
