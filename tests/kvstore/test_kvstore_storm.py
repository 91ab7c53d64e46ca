"""After any storm of uploads, reads, deletes, claims and cancels, nothing is held."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from kvstore_worlds import FINGERPRINT, TENANT, Chunk, eventually, make_chunk, running_node

from spolia.v1.kvstore_pb2 import DURABILITY_DISK, DURABILITY_RAM, Durability
from spolia_core.errors import SpoliaError
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline
from spolia_node.store_address import stores_at
from spolia_node.store_client import StoreClient

CHUNKS = [make_chunk(number, num_tokens=64 * (1 + number % 3), head_dim=256) for number in range(12)]
BUDGET_BYTES = sum(len(chunk.data) for chunk in CHUNKS) // 3
NUM_WORKERS, NUM_STEPS = 10, 9


async def act(
    client: StoreClient,
    source: random.Random,
    owner: str,
    outcomes: Counter[str],
    durabilities: Sequence[Durability.ValueType],
) -> None:
    """One random thing a node may do. Whatever comes back must be right."""
    chunks = source.sample(CHUNKS, 3)
    ids, deadline = [chunk.chunk_id for chunk in chunks], Deadline.after(30.0)
    match source.choice(["put", "put", "get", "get", "claim", "pin", "delete"]):
        case "put":
            durability = source.choice(durabilities)
            await client.put(TENANT, chunks[0].info, chunks[0].data, deadline, owner, durability=durability)
        case "get":
            await read(client, chunks, outcomes)
        case "claim":
            await client.claim(TENANT, ids, owner, deadline, ttl_ms=200, wait_ms=source.choice([0, 50]))
        case "pin":
            await client.pin(TENANT, ids[:1], owner, deadline, lease_ms=50)
        case "delete":
            await client.delete(TENANT, ids[:1], deadline)


async def read(client: StoreClient, chunks: list[Chunk], outcomes: Counter[str]) -> None:
    ids = [chunk.chunk_id for chunk in chunks]
    async for fetched in client.get(TENANT, ids, FINGERPRINT, ["raw"], Deadline.after(30.0)):
        if fetched.data is not None:
            assert fetched.data == chunks[fetched.index].data
        outcomes["read" if fetched.data is not None else "missed"] += 1


async def work(
    client: StoreClient, number: int, outcomes: Counter[str], durabilities: Sequence[Durability.ValueType]
) -> None:
    source = random.Random(number)
    for _ in range(NUM_STEPS):
        task = asyncio.create_task(act(client, source, f"worker-{number}", outcomes, durabilities))
        if source.random() < 0.3:
            await asyncio.sleep(source.random() * 0.01)
            task.cancel()
        await asyncio.wait([task], timeout=60)
        if task.cancelled():
            outcomes["cancelled"] += 1
        elif (error := task.exception()) is not None:
            assert isinstance(error, SpoliaError), error
            outcomes[type(error).__name__] += 1


@pytest.mark.parametrize("has_disk", [False, True])
async def test_after_a_storm_nothing_is_held(tmp_path: Path, has_disk: bool) -> None:
    channels, outcomes = ChannelPool(16 << 20), Counter[str]()
    durabilities = [DURABILITY_RAM, DURABILITY_DISK][: 1 + has_disk]
    folder = tmp_path if has_disk else None
    async with running_node(budget_bytes=BUDGET_BYTES, data_dir=folder, disk_budget_bytes=2 * BUDGET_BYTES) as node:
        client, tiers = StoreClient(channels, lambda: stores_at(node.server.address)), node.store.tiers
        await asyncio.gather(*(work(client, number, outcomes, durabilities) for number in range(NUM_WORKERS)))
        await eventually(lambda: tiers.num_transfers == node.store.claims.num_waiters == 0)
        node.store.check_invariants()
        assert tiers.ram.held_bytes == sum(tiers.ram.arena.charge(stored.size) for stored in tiers.ram)
        assert node.store.counters.digest_failures == 0
        await eventually(lambda: node.store.pins.num_live == node.store.claims.num_live() == 0)
        await client.delete(TENANT, [chunk.chunk_id for chunk in CHUNKS], Deadline.after(30.0))
        assert (tiers.ram.held_bytes, node.store.num_objects, node.store.tenants.held()) == (0, 0, {})
        if tiers.disk is not None:
            assert (tiers.disk.used_bytes, list(tiers.disk.files.scan()), tiers.disk.files.quarantined()) == (0, [], [])
            assert tiers.disk.num_errors == 0
    await channels.close()
    assert min(outcomes[kind] for kind in ("read", "missed", "cancelled")) > 0, outcomes
    assert not set(outcomes) - {"read", "missed", "cancelled", "AlreadyStored", "Busy"}, outcomes
