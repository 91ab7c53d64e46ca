"""A tier that is slower than computing is skipped, as long as that is known, and only where the cost is."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest
from kvstore_worlds import TENANT, HandClock, key_of, make_chunk, make_record
from tier_worlds import ANYONE, CHUNK_BYTES, World, open_world

from spolia_core.errors import Busy
from spolia_core.reuse import MissReason
from spolia_kvstore.catalog import Totals
from spolia_kvstore.cost_gate import MIN_SAMPLES, REMEASURE_AFTER_S, CostGate
from spolia_kvstore.entry import Reader
from spolia_kvstore.objects import ObjectRecord, Tier
from spolia_kvstore.store import ClaimState

CHUNK = make_chunk(1, compute_s=0.5)
UNMEASURED = make_chunk(2)
KEY = key_of(CHUNK)


def costing(compute_s: float, size_bytes: int = 1000) -> ObjectRecord:
    return replace(make_record(1, size_bytes), compute_s=compute_s)


def measured(seconds_per_byte: float, clock: HandClock | None = None, *, enabled: bool = True) -> CostGate:
    gate = CostGate(enabled=enabled, clock=clock or HandClock())
    for _ in range(MIN_SAMPLES):
        gate.observe(Tier.DISK, 1000, 1000 * seconds_per_byte)
    return gate


def slow_down(world: World) -> None:
    """Makes the disk measure ten times slower than computing `CHUNK`."""
    for _ in range(50):
        world.tiers.gate.observe(Tier.DISK, CHUNK_BYTES, 5.0)


def test_what_is_read_faster_than_computed_is_not_skipped() -> None:
    gate = measured(1e-3)
    assert gate.skips(costing(0.9), Tier.DISK)
    assert not gate.skips(costing(1.1), Tier.DISK)
    assert not gate.skips(costing(0.9, size_bytes=800), Tier.DISK)
    assert not gate.skips(costing(0.9), Tier.RAM), "nothing is known of memory"


def test_a_cost_or_a_speed_that_nobody_knows_skips_nothing() -> None:
    assert not measured(1e9).skips(costing(0.0), Tier.DISK)
    gate = CostGate(clock=HandClock())
    for _ in range(MIN_SAMPLES - 1):
        gate.observe(Tier.DISK, 1000, 1e6)
    gate.observe(Tier.DISK, 0, 1e6)
    assert not gate.skips(costing(1.0), Tier.DISK)
    gate.observe(Tier.DISK, 1000, 1e6)
    assert gate.skips(costing(1.0), Tier.DISK)


def test_a_gate_that_is_off_measures_and_skips_nothing() -> None:
    gate = measured(1e-3, enabled=False)
    assert not gate.skips(costing(0.1), Tier.DISK)
    assert gate.speeds[Tier.DISK].bytes_per_s == pytest.approx(1000)


def test_a_tier_nobody_read_for_a_while_is_tried_again() -> None:
    clock = HandClock()
    gate = measured(1e-3, clock)
    clock.now += REMEASURE_AFTER_S - 0.1
    assert gate.skips(costing(0.9), Tier.DISK)
    clock.now += 0.1
    assert not gate.skips(costing(0.9), Tier.DISK)


def test_the_measure_is_a_mean_at_first_and_follows_change() -> None:
    gate = CostGate(clock=HandClock())
    for seconds in (1.0, 3.0):
        gate.observe(Tier.DISK, 1, seconds)
    assert gate.speeds[Tier.DISK].seconds_per_byte == pytest.approx(2.0)
    for _ in range(40):
        gate.observe(Tier.DISK, 1, 0.5)
    assert gate.speeds[Tier.DISK].seconds_per_byte == pytest.approx(0.5, rel=0.01)


async def test_a_slow_tier_is_a_miss_with_its_reason_for_those_whose_cost_is_known(tmp_path: Path) -> None:
    async with open_world(tmp_path, cost_gate=True) as world:
        await world.put_on_disk_only(CHUNK, UNMEASURED)
        slow_down(world)
        keys = [KEY, key_of(UNMEASURED)]
        skipped = MissReason.SLOWER_THAN_COMPUTING
        assert [entry.miss for entry in await world.store.lookup(keys, ANYONE)] == [skipped, None]
        assert await world.get(CHUNK) == [skipped]
        assert world.store.counters.misses[skipped] == 1
        assert await world.get(CHUNK, reader=Reader(ignore_cost=True)) == [(Tier.DISK, CHUNK.data)]
        assert await world.get(CHUNK) == [(Tier.RAM, CHUNK.data)], "memory is another tier"


async def test_what_is_skipped_can_be_claimed_and_stored_again_and_the_old_file_goes(tmp_path: Path) -> None:
    async with open_world(tmp_path, cost_gate=True) as world:
        await world.put_on_disk_only(CHUNK)
        assert [r.state for r in await world.store.claim([KEY], "a", 30.0, 0.0)] == [ClaimState.STORED]
        slow_down(world)
        assert [r.state for r in await world.store.claim([KEY], "a", 30.0, 0.0)] == [ClaimState.GRANTED]
        await world.put(CHUNK)
        assert world.where(CHUNK) == ["RAM+DISK"], "it was on disk, so the new one is"
        assert [found.path for found in world.disk.files.scan()] == [world.file_of(CHUNK)]
        assert world.store.claims.num_live() == 0
        assert world.store.num_objects == 1


async def test_a_tenant_is_counted_what_it_holds_when_the_new_object_has_another_size(tmp_path: Path) -> None:
    bigger = make_chunk(1, num_tokens=32, compute_s=1.0)
    assert key_of(bigger) == KEY
    async with open_world(tmp_path, cost_gate=True) as world:
        await world.put_on_disk_only(CHUNK)
        slow_down(world)
        await world.put(bigger)
        assert world.store.tenants.held() == {TENANT: Totals(1, len(bigger.data))}
        assert world.disk.used_bytes == len(bigger.data)
        await world.store.delete([KEY])
        assert world.store.tenants.held() == {}


async def test_a_disk_that_cannot_take_the_new_object_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    async with open_world(tmp_path, cost_gate=True) as world:
        await world.put_on_disk_only(CHUNK)
        slow_down(world)
        monkeypatch.setattr(world.disk.files, "write", is_full)
        with pytest.raises(Busy, match="keeps the older one"):
            await world.put(make_chunk(1, num_tokens=32, compute_s=1.0))
        assert world.where(CHUNK) == ["DISK"]
        assert await world.get(CHUNK, reader=Reader(ignore_cost=True)) == [(Tier.DISK, CHUNK.data)]
        assert world.store.tenants.held() == {TENANT: Totals(1, len(CHUNK.data))}


async def test_a_slow_disk_is_measured_again_after_a_while(tmp_path: Path) -> None:
    async with open_world(tmp_path, cost_gate=True) as world:
        await world.put_on_disk_only(CHUNK)
        slow_down(world)
        assert await world.get(CHUNK) == [MissReason.SLOWER_THAN_COMPUTING]
        world.clock.now += REMEASURE_AFTER_S
        for _ in range(2 * MIN_SAMPLES):
            assert await world.get(CHUNK) == [(Tier.DISK, CHUNK.data)], "it is fast again"
            world.drop_from_memory(KEY)
            world.clock.now += 1.0


async def test_nothing_is_written_to_a_disk_from_which_it_would_not_be_read(tmp_path: Path) -> None:
    async with open_world(tmp_path, cost_gate=True, num_in_memory=1) as world:
        slow_down(world)
        await world.put(CHUNK)
        await world.put(UNMEASURED)
        await world.put(make_chunk(3))
        assert world.where(CHUNK, UNMEASURED) == ["", "DISK"]
