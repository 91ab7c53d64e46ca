"""The process under `kill -9` and under load: what it promised stays, and its memory keeps to its budget."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from kvstore_worlds import FINGERPRINT, TENANT, Chunk, make_big_chunk, make_chunk

from spolia.v1.common_pb2 import TIER_DISK, TIER_RAM
from spolia.v1.kvstore_pb2 import CLAIM_STATE_GRANTED, CLAIM_STATE_HELD, DURABILITY_DISK
from spolia_bench.store.processes import StoreProcess
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline
from spolia_node.store_address import StoreAddress
from spolia_node.store_client import StoreClient

SMALL = [make_chunk(number, num_tokens=64, head_dim=32) for number in range(6)]
BUDGET_BYTES = 96 << 20
OVERHEAD_BYTES = 256 << 20


def soon() -> Deadline:
    return Deadline.after(60.0)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[StoreProcess]:
    process = StoreProcess("kvstore-0", tmp_path, ["--budget-bytes", str(BUDGET_BYTES), "--log-level", "warning"])
    process.start()
    yield process
    process.kill()


class Client:
    """A client that connects anew after each kill."""

    def __init__(self, process: StoreProcess) -> None:
        self.process = process
        self.channels = ChannelPool(32 << 20)
        self.store = StoreClient(self.channels, lambda: [StoreAddress("", process.address)])

    async def restart(self) -> None:
        await asyncio.to_thread(self.process.kill)
        await asyncio.to_thread(self.process.start)
        self.channels.drop(self.process.address)

    async def put(self, chunk: Chunk) -> None:
        await self.store.put(TENANT, chunk.info, chunk.data, soon(), durability=DURABILITY_DISK)

    async def get(self, chunks: list[Chunk]) -> list[tuple[bool, int]]:
        """Whether each came as it was put, and from which tier."""
        ids = [chunk.chunk_id for chunk in chunks]
        fetched = [each async for each in self.store.get(TENANT, ids, FINGERPRINT, ["raw"], soon(), ignore_cost=True)]
        return [(each.data == chunks[each.index].data, each.entry.tier) for each in fetched]


async def test_what_was_acknowledged_on_disk_survives_kill_9_bit_for_bit(process: StoreProcess) -> None:
    client = Client(process)
    for chunk in SMALL:
        await client.put(chunk)
    await client.restart()
    assert await client.get(SMALL) == [(True, TIER_DISK)] * len(SMALL)
    assert await client.get(SMALL) == [(True, TIER_RAM)] * len(SMALL), "what is read comes back into memory"
    await client.channels.close()


async def test_pins_and_claims_outlive_the_process_and_end_with_their_leases(process: StoreProcess) -> None:
    client = Client(process)
    await client.put(SMALL[0])
    ids, missing, wanted = [SMALL[0].chunk_id], [SMALL[1].chunk_id], [SMALL[2].chunk_id]
    for owner, lease_ms in (("node-1", 600_000), ("node-2", 6000)):
        assert await client.store.pin(TENANT, ids, owner, soon(), lease_ms=lease_ms) == [True]
    for claimed, ttl_ms in ((missing, 600_000), (wanted, 6000)):
        (claim,) = await client.store.claim(TENANT, claimed, "node-1", soon(), ttl_ms=ttl_ms)
        assert claim.state == CLAIM_STATE_GRANTED
    await client.restart()
    (stats,) = await client.store.stats(soon())
    assert (stats.num_pins, stats.num_claims) in ((2, 2), (1, 2), (1, 1)), "a slow start may outlast the short ones"
    (claim,) = await client.store.claim(TENANT, missing, "node-2", soon())
    assert (claim.state, claim.owner) == (CLAIM_STATE_HELD, "node-1")
    (claim,) = await client.store.claim(TENANT, wanted, "node-2", soon(), wait_ms=20_000)
    assert claim.state == CLAIM_STATE_GRANTED
    (stats,) = await client.store.stats(soon())
    assert (stats.num_pins, stats.num_claims) == (1, 2)
    await client.channels.close()


async def test_what_was_in_memory_only_for_a_while_survives_kill_9_too(process: StoreProcess) -> None:
    client = Client(process)
    for chunk in SMALL:
        await client.store.put(TENANT, chunk.info, chunk.data, soon())
    async with asyncio.timeout(30):
        while (await client.store.stats(soon()))[0].tiers[1].num_objects < len(SMALL):  # noqa: ASYNC110 - a process
            await asyncio.sleep(0.1)
    await client.restart()
    assert await client.get(SMALL) == [(True, TIER_DISK)] * len(SMALL)
    await client.channels.close()


async def test_ended_in_order_a_store_writes_down_what_it_has_in_memory_only(process: StoreProcess) -> None:
    client = Client(process)
    for chunk in SMALL:
        await client.store.put(TENANT, chunk.info, chunk.data, soon())
    await asyncio.to_thread(process.stop)
    await client.restart()
    assert await client.get(SMALL) == [(True, TIER_DISK)] * len(SMALL)
    await client.channels.close()


@pytest.mark.slow
async def test_memory_stays_within_the_budget_and_a_fixed_overhead(process: StoreProcess) -> None:
    """Four times the budget passes through, from several clients at once, in and out."""
    client = Client(process)
    most = 0

    async def one(number: int) -> None:
        chunk = make_big_chunk(number, mebibytes=16)
        await client.store.put(TENANT, chunk.info, chunk.data, soon())
        assert [ok for ok, _ in await client.get([chunk])] == [True]

    for first in range(0, 24, 4):
        await asyncio.gather(*(one(first + i) for i in range(4)))
        most = max(most, process.memory_bytes())
    (stats,) = await client.store.stats(soon())
    assert stats.tiers[0].evictions > 0
    assert most <= BUDGET_BYTES + OVERHEAD_BYTES, f"{most >> 20} MiB"
    await client.channels.close()
