"""Objects that this release does not know: listed, counted, never served, and replaced by what it can serve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from captured_logs import captured_logs
from kvstore_worlds import FINGERPRINT, TENANT, announced, key_of, make_chunk
from tier_worlds import ANYONE, World, open_world

from spolia_core.reuse import MissReason
from spolia_kvstore.catalog_row import Row
from spolia_kvstore.disk_rows import name_of
from spolia_kvstore.entry import Reader
from spolia_kvstore.housekeeping import Housekeeping, ObjectState
from spolia_kvstore.objects import Tier
from spolia_kvstore.recovery import open_folder
from spolia_kvstore.store import ClaimState
from spolia_kvstore.usage import Usage

KNOWN, STRANGE = make_chunk(1), make_chunk(2)
STATES = {
    ("format_version", 99): (ObjectState.UNKNOWN_FORMAT, MissReason.FORMAT_VERSION),
    ("codec", "zstd-of-tomorrow"): (ObjectState.UNKNOWN_CODEC, MissReason.CODEC),
}


def leave_behind(folder: Path, **changes: object) -> None:
    """What another release left: a file and a row that this one does not know."""
    opened = open_folder(folder, 900.0)
    record = replace(announced(STRANGE), replica="other/1", **changes)  # type: ignore[arg-type]  # fields differ in type
    row = Row(record, Tier.DISK, Usage(90.0, 90.0, hits=7), (b"d" * 16,), "f1")
    opened.files.write(name_of(row), [memoryview(STRANGE.data)])
    opened.catalog.put(row)
    opened.catalog.close()


@pytest.fixture(params=STATES, ids=lambda change: change[0])
def strange(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, ObjectState, MissReason]:
    field, value = request.param
    leave_behind(tmp_path, **{field: value})
    return tmp_path, *STATES[request.param]


def states(world: World) -> dict[bytes, ObjectState]:
    return {item.record.key.chunk_id: item.state for item in world.admin.list()}


async def test_what_is_unknown_is_listed_with_its_state_and_counted(
    strange: tuple[Path, ObjectState, MissReason],
) -> None:
    folder, state, _ = strange
    async with open_world(folder) as world:
        await world.put(KNOWN)
        assert states(world) == {KNOWN.chunk_id: ObjectState.SERVED, STRANGE.chunk_id: state}
        assert world.store.tenants.held()[TENANT].num_objects == 2
        (item,) = world.admin.list(TENANT, STRANGE.chunk_id)
        assert (item.hits, item.tiers, item.age_s) == (7, (Tier.DISK,), world.clock.now - 90.0)


async def test_what_is_unknown_is_never_served(strange: tuple[Path, ObjectState, MissReason]) -> None:
    folder, _, reason = strange
    for reader in (ANYONE, Reader(frozenset({"raw", "zstd-of-tomorrow"}), FINGERPRINT, ignore_cost=True)):
        async with open_world(folder) as world:
            (entry,) = await world.store.lookup([key_of(STRANGE)], reader)
            assert (entry.record, entry.miss) == (None, reason)
            assert await world.get(STRANGE, reader=reader) == [reason]
            assert world.store.counters.misses[reason] == 1


async def test_what_is_unknown_can_be_claimed_and_is_replaced_by_what_is_known(
    strange: tuple[Path, ObjectState, MissReason],
) -> None:
    folder, _, _ = strange
    async with open_world(folder) as world:
        assert [r.state for r in await world.store.claim([key_of(STRANGE)], "a", 30.0, 0.0)] == [ClaimState.GRANTED]
        await world.put(STRANGE, durable=True)
        assert await world.get(STRANGE) == [(Tier.RAM, STRANGE.data)]
        assert states(world) == {STRANGE.chunk_id: ObjectState.SERVED}
        assert len(list(world.disk.files.scan())) == 1


async def test_of_an_unknown_format_a_check_says_nothing(strange: tuple[Path, ObjectState, MissReason]) -> None:
    folder, _, _ = strange
    async with open_world(folder) as world:
        *_, verified = [progress async for progress in world.admin.verify("", [])]
        assert (verified.num_checked, verified.damaged) == (1, [])
        assert world.where(STRANGE) == ["DISK"]


async def test_what_is_unknown_is_dropped_only_when_that_is_asked(
    strange: tuple[Path, ObjectState, MissReason],
) -> None:
    folder, _, _ = strange
    async with open_world(folder) as world:
        await world.put(KNOWN)
        for drop_unknown, dry_run, left in ((False, False, 2), (True, True, 2), (True, False, 1)):
            collected = await world.admin.collect(drop_unknown=drop_unknown, idle_s=0.0, dry_run=dry_run)
            assert collected.dropped.num_objects == int(drop_unknown)
            assert world.store.num_objects == left
        assert states(world) == {KNOWN.chunk_id: ObjectState.SERVED}


async def test_a_model_that_no_node_serves_now_is_named_and_its_objects_are_kept(tmp_path: Path) -> None:
    other = make_chunk(3, fingerprint=b"o" * 32)
    async with open_world(tmp_path) as world:
        await world.put(KNOWN, other)
        for served, state in (
            ({FINGERPRINT}, ObjectState.UNKNOWN_FINGERPRINT),
            ({FINGERPRINT, b"o" * 32}, ObjectState.SERVED),
            (set(), ObjectState.SERVED),
        ):
            admin = Housekeeping(world.store, lambda served=served: served)  # type: ignore[misc]  # mypy cannot infer a lambda's default
            assert {item.record.key: item.state for item in admin.list()} == {
                key_of(KNOWN): ObjectState.SERVED,
                key_of(other): state,
            }
            await admin.collect(drop_unknown=True, idle_s=0.0, dry_run=False)
        assert await world.get(other) == [(Tier.RAM, other.data)]
        assert await world.get(other, reader=Reader(fingerprint=FINGERPRINT)) == [MissReason.FINGERPRINT]


async def test_what_is_unknown_is_evicted_like_anything_else(strange: tuple[Path, ObjectState, MissReason]) -> None:
    folder, _, _ = strange
    with captured_logs():
        async with open_world(folder, num_on_disk=1) as world:
            await world.put(KNOWN, durable=True)
            assert world.where(STRANGE, KNOWN) == ["", "RAM+DISK"]
