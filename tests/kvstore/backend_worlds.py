"""Small worlds for the tests of backends: records, replicas, and ears for news."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from redis_server import RedisServer

from spolia_core.reuse import ChunkKind
from spolia_kvstore.backend import Backend, Replica
from spolia_kvstore.objects import ObjectKey, ObjectRecord, Tier
from spolia_kvstore.redis_backend import RedisBackend

TENANT = "tenant"
HERE, THERE = "store-a", "store-b"
LIVE = {HERE, THERE}
GRACE_S = 30.0
"""How long what must happen may take; a test that passes does not wait."""


def a_key(number: int, tenant_id: str = TENANT) -> ObjectKey:
    return ObjectKey(tenant_id, number.to_bytes(32, "big"))


def a_record(key: ObjectKey) -> ObjectRecord:
    """Every field has a value of its own."""
    return ObjectRecord(
        key=key,
        kind=ChunkKind.PREFIX,
        format_version=3,
        codec="raw",
        fingerprint=b"f" * 32,
        num_tokens=128,
        size_bytes=5 << 32,
        digest=b"d" * 16,
        replica="replica-7",
        compute_s=0.3,
    )


def a_replica(key: ObjectKey, tier: Tier = Tier.RAM, store_id: str = HERE) -> Replica:
    return Replica(a_record(key), tier, store_id)


class Ear:
    """Counts what a backend tells, and waits for it."""

    def __init__(self, backend: Backend) -> None:
        self.ended: list[ObjectKey] = []
        self.num_member_changes = 0
        self.num_reconnects = 0
        backend.on_claims_ended(self._on_claims_ended)
        backend.on_members_changed(self._on_members_changed)
        backend.on_reconnected(self._on_reconnected)

    def _on_claims_ended(self, keys: Sequence[ObjectKey]) -> None:
        self.ended += keys

    def _on_members_changed(self) -> None:
        self.num_member_changes += 1

    def _on_reconnected(self) -> None:
        self.num_reconnects += 1


async def eventually(condition: Callable[[], bool]) -> None:
    """Returns once `condition` holds."""
    async with asyncio.timeout(GRACE_S):
        while not condition():  # noqa: ASYNC110 - Redis has no event for it
            await asyncio.sleep(0.005)


async def eventually_so(condition: Callable[[], Awaitable[bool]]) -> None:
    """Returns once what is asked says so."""
    deadline = time.monotonic() + GRACE_S
    while not await condition():
        assert time.monotonic() < deadline, "did not happen"
        await asyncio.sleep(0.005)


@asynccontextmanager
async def connected(server: RedisServer, prefix: str, timeout_s: float = 20.0) -> AsyncIterator[RedisBackend]:
    """A started backend that has reached Redis. Waits long by default: a busy machine is no lesson here."""
    backend = RedisBackend(server.url, prefix, timeout_s=timeout_s)
    await backend.start()
    try:
        await eventually(lambda: backend.reachable)
        yield backend
    finally:
        await backend.close()


async def all_news_has_come(backend: Backend, ear: Ear) -> None:
    """Returns when everything told so far has been heard: news comes in order, so one more is told and waited for."""
    marker = a_key(len(ear.ended), "the end of the news")
    await backend.claim([marker], "nobody", 60.0, LIVE)
    assert await backend.unclaim([marker], "nobody") == [True]
    await eventually(lambda: marker in ear.ended)
    ear.ended.remove(marker)
