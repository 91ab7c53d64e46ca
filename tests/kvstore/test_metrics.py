"""The store's counts: every name from the first moment, with its unit in it, and true."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from captured_logs import captured_logs
from kvstore_worlds import TENANT, key_of, make_chunk
from prometheus_client import CollectorRegistry, generate_latest
from tier_worlds import CHUNK_BYTES, World, open_world

from spolia_core.reuse import MissReason
from spolia_kvstore.metrics import StoreCollector
from spolia_kvstore.objects import Tier

ONE, TWO, THREE = (make_chunk(number) for number in (1, 2, 3))
TIERS = {"ram", "disk"}
UNITS = {"bytes", "seconds", "total"}


def registry_of(world: World) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(StoreCollector(world.store))
    return registry


class Values:
    """Samples by short name, as they stand now."""

    def __init__(self, world: World) -> None:
        self._registry = registry_of(world)

    def __call__(self, name: str, **labels: str) -> float:
        value = self._registry.get_sample_value(f"spolia_store_{name}", labels)
        assert value is not None, (name, labels)
        return value


def names_and_labels(world: World) -> set[tuple[str, tuple[str, ...]]]:
    """Every sample there is but those of tenants, which come and go."""
    return {
        (sample.name, tuple(sorted(sample.labels.values())))
        for family in registry_of(world).collect()
        for sample in family.samples
        if "tenant" not in sample.labels
    }


@pytest.mark.parametrize("has_disk", [False, True])
async def test_every_name_and_label_is_there_before_the_first_request(tmp_path: Path, has_disk: bool) -> None:
    async with open_world(tmp_path if has_disk else None, num_in_memory=1) as world:
        before = names_and_labels(world)
        await world.put(ONE, TWO, durable=has_disk)
        await world.get(ONE, TWO, THREE)
        await world.store.delete([key_of(ONE)])
        assert names_and_labels(world) == before
        labels = {labels for name, labels in before if name == "spolia_store_misses_total"}
        assert labels == {(reason.name.lower(),) for reason in MissReason}
        for name in ("tier_objects", "tier_bytes", "hits_total", "evictions_total", "read_seconds_per_byte"):
            assert {labels for each, labels in before if each == f"spolia_store_{name}"} == {(t,) for t in TIERS}


async def test_names_carry_their_unit() -> None:
    async with open_world() as world:
        for family in registry_of(world).collect():
            words = family.name.removeprefix("spolia_store_").split("_")
            assert family.documentation.endswith(".")
            if family.type == "counter":
                assert all(sample.name.endswith("_total") for sample in family.samples)
            unit = UNITS & set(words)
            speaks_of_size = "Bytes" in family.documentation or "budget" in words
            assert not speaks_of_size or "bytes" in unit, family.name
            speaks_of_time = "Time " in family.documentation or "cost" in family.documentation
            assert not speaks_of_time or "seconds" in unit, family.name


async def test_counts_follow_an_object_through_the_tiers(tmp_path: Path) -> None:
    async with open_world(tmp_path, num_in_memory=1) as world:
        value = Values(world)
        await world.put(ONE, TWO)
        assert [value("objects"), value("puts_total"), value("lost_evictions_total")] == [2, 2, 0]
        assert [value("tier_objects", tier=tier) for tier in ("ram", "disk")] == [1, 1]
        assert [value("tier_bytes", tier=tier) for tier in ("ram", "disk")] == [CHUNK_BYTES] * 2
        assert [value("evicted_bytes_total", tier=tier) for tier in ("ram", "disk")] == [CHUNK_BYTES, 0]
        assert value("written_bytes_total") == CHUNK_BYTES
        assert value("write_seconds_total") > 0
        await world.get(ONE, TWO, THREE)
        assert [value("hits_total", tier=tier) for tier in ("ram", "disk")] == [1, 1]
        assert [value("read_bytes_total", tier=tier) for tier in ("ram", "disk")] == [CHUNK_BYTES] * 2
        assert value("misses_total", reason="not_found") == 1
        assert value("read_seconds_per_byte", tier="disk") > 0
        assert [value("tenant_objects", tenant=TENANT), value("tenant_bytes", tenant=TENANT)] == [2, 2 * CHUNK_BYTES]


async def test_pins_claims_and_transfers_are_those_of_now() -> None:
    async with open_world() as world:
        value = Values(world)
        await world.put(ONE)
        world.store.pin([key_of(ONE)], "me", 10.0)
        await world.store.claim([key_of(TWO)], "me", 10.0, 0.0)
        upload = await world.filled(THREE)
        assert [value("pins"), value("claims"), value("transfers"), value("claim_waiters")] == [1, 1, 1, 0]
        assert value("held_bytes") == 2 * CHUNK_BYTES
        world.store.puts.abort(upload)
        world.clock.now += 10.0
        assert [value("pins"), value("claims"), value("transfers")] == [0, 0, 0]


async def test_a_disk_that_fails_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "input/output error")

    async with open_world(tmp_path, num_in_memory=1) as world:
        value = Values(world)
        assert [value("disk_healthy"), value("backend_reachable")] == [1, 1]
        await world.put_on_disk_only(ONE)
        world.file_of(ONE).unlink()
        monkeypatch.setattr(world.disk.files, "write", fail)
        with captured_logs():
            await world.put(TWO, THREE)
            await world.get(ONE)
        assert value("disk_healthy") == 0
        assert [value("disk_errors_total", operation=name) for name in ("read", "write", "index")] == [1, 1, 0]
        assert [value("lost_evictions_total"), value("quarantined_total")] == [1, 1]
        assert value("misses_total", reason="unreadable") == 1


async def test_the_page_can_be_read_while_nothing_is_there() -> None:
    async with open_world() as world:
        assert b"spolia_store_tenant_bytes" in generate_latest(registry_of(world))
        assert len(Tier) == len(TIERS)
