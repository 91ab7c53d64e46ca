"""What is left when the killing is over: all that was promised, and nothing that should have ended."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from spolia.v1.kvstore_pb2 import CollectRequest, CollectResponse, GetStatsResponse, LookupRequest
from spolia.v1.kvstore_pb2_grpc import KVStoreServiceStub
from spolia_bench.store.objects import FINGERPRINT
from spolia_bench.store.processes import StoreProcess
from spolia_core.digests import digest
from spolia_core.errors import SpoliaError
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline
from spolia_node.store_client import StoreClient

SETTLE_TIMEOUT_S = 30.0
BATCH = 32
EVICTED = "evicted from disk"
"""The event of the store's log that tells an eviction from a loss."""


@dataclass(slots=True)
class Aftermath:
    """Counts once all is quiet."""

    lost: int = 0
    evicted: int = 0
    leaked_pins: int = 0
    leaked_claims: int = 0
    leaked_transfers: int = 0
    not_located: int = 0
    """Objects that a store does not know another has."""
    orphan_files: int = 0
    lost_rows: int = 0
    quarantined: int = 0


def evicted_in(logs: Sequence[Path]) -> set[bytes]:
    """Ids of the objects whose eviction from disk a store logged."""
    found = set()
    for path in logs:
        for line in path.read_text(errors="replace").splitlines():
            if EVICTED in line:
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # cut short by a kill
                if entry.get("event") == EVICTED:
                    found.add(bytes.fromhex(entry["chunk_id"]))
    return found


async def settle(
    client: StoreClient,
    channels: ChannelPool,
    stores: Sequence[StoreProcess],
    tenant_id: str,
    truth: Mapping[bytes, bytes],
) -> tuple[Aftermath, int]:
    """Reads everything in `truth` (id → digest) again; counts, and how many had other bytes than were put."""
    after = Aftermath()
    await _wait_until_reachable(client)
    missing, corrupt = await _read_all(client, tenant_id, truth)
    # Read after the objects, whose reading evicts others.
    evicted = evicted_in([store.log_path for store in stores])
    after.evicted, after.lost = len(missing & evicted), len(missing - evicted)
    stats = await _wait_until_idle(client)
    after.leaked_pins = sum(each.num_pins for each in stats)
    after.leaked_claims = sum(each.num_claims for each in stats)
    after.leaked_transfers = sum(each.num_transfers for each in stats)
    after.quarantined = sum(each.num_quarantined for each in stats)
    after.not_located = await _not_located(channels, stores, tenant_id, [i for i in truth if i not in missing])
    for store in stores:
        call = KVStoreServiceStub(channels.get(store.address, "kvstore")).Collect(
            CollectRequest(dry_run=True), timeout=60
        )
        collected: CollectResponse = await call
        after.orphan_files += collected.orphan_files
        after.lost_rows += collected.lost_rows
    return after, corrupt


async def _read_all(client: StoreClient, tenant_id: str, truth: Mapping[bytes, bytes]) -> tuple[set[bytes], int]:
    """Ids that nobody has, and how many had other bytes."""
    missing, corrupt = set(), 0
    ids = list(truth)
    for start in range(0, len(ids), BATCH):
        batch = ids[start : start + BATCH]
        async with aclosing(
            client.get(tenant_id, batch, FINGERPRINT, ["raw"], Deadline.after(60.0), ignore_cost=True)
        ) as chunks:
            async for chunk in chunks:
                if chunk.data is None:
                    missing.add(chunk.chunk_id)
                else:
                    corrupt += digest(chunk.data) != truth[chunk.chunk_id]
    return missing, corrupt


async def _wait_until_reachable(client: StoreClient) -> None:
    """Until both stores answer and have their shared index again."""
    until = time.monotonic() + SETTLE_TIMEOUT_S
    while time.monotonic() < until:
        try:
            stats = await client.stats(Deadline.after(5.0))
        except SpoliaError:
            stats = []
        if len(stats) == 2 and all(each.backend_reachable for each in stats):
            await asyncio.sleep(2.0)  # to say everything again
            return
        await asyncio.sleep(0.1)
    raise RuntimeError("the stores or their index did not come back")


async def _wait_until_idle(client: StoreClient) -> list[GetStatsResponse]:
    """Leases run out by themselves; what has not after a while is leaked."""
    until = time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        stats = await client.stats(Deadline.after(5.0))
        is_idle = all(each.num_pins == each.num_claims == each.num_transfers == 0 for each in stats)
        if is_idle or time.monotonic() > until:
            return stats
        await asyncio.sleep(0.2)


async def _not_located(
    channels: ChannelPool, stores: Sequence[StoreProcess], tenant_id: str, ids: Sequence[bytes]
) -> int:
    """Each object is at one store; every store must be able to say where."""
    missing = 0
    for start in range(0, len(ids), 1000):
        request = LookupRequest(tenant_id=tenant_id, chunk_ids=ids[start : start + 1000], ignore_cost=True)
        answers = [
            await KVStoreServiceStub(channels.get(store.address, "kvstore")).Lookup(request, timeout=60)
            for store in stores
        ]
        for entries in zip(*(answer.entries for answer in answers), strict=True):
            is_somewhere = any(entry.HasField("info") for entry in entries)
            missing += is_somewhere and not all(entry.HasField("info") for entry in entries)
    return missing
