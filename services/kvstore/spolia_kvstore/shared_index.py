"""One store's part in an index that several share: says what it holds, and asks who holds the rest.

What cannot be said while the backend is away is said when it is back (`index_sync.py`). With an index of its own a
store says nothing and asks nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress

from spolia_core.errors import Unavailable
from spolia_core.ids import SHARED_TENANT
from spolia_kvstore.backend import Backend, Replica
from spolia_kvstore.entry import Elsewhere, Location
from spolia_kvstore.objects import ObjectKey, ObjectRecord, Tier
from spolia_kvstore.tiers import Found, Tiers
from spolia_node.logs import get_log

log = get_log(__name__)


class SharedIndex:
    """Used from one event loop. `stores` tells the live stores, this one, `name`, included: node id → address."""

    def __init__(self, backend: Backend, tiers: Tiers, *, name: str, stores: Callable[[], Mapping[str, str]]) -> None:
        self.backend = backend
        self.unsaid: set[tuple[ObjectKey, Tier]] = set()
        """What left while the backend was away."""
        self.unburied: set[ObjectKey] = set()
        """What was deleted while the backend was away."""
        self._tiers = tiers
        self._name = name
        self._may_say = asyncio.Event()  # set while nothing is being buried
        self._may_say.set()
        self._stores = stores
        self._tasks: set[asyncio.Task[object]] = set()

    @property
    def is_shared(self) -> bool:
        """Whether there is anybody to tell."""
        return self.backend.is_shared

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being said in the background."""
        return not self._tasks

    def others(self) -> list[str]:
        """The other live stores."""
        return [store_id for store_id in self._stores() if store_id != self._name]

    def here(self, tier: Tier) -> tuple[Location, ...]:
        """This store, as the place of an object."""
        return (Location(self._name, self._stores().get(self._name, ""), tier),) if self.is_shared else ()

    async def locate(self, keys: Sequence[ObjectKey], *, with_shared: bool = True) -> dict[ObjectKey, Elsewhere]:
        """Which other live stores have these, which are of one tenant, also as what all tenants share; none while the
        backend is away."""
        tenants = [keys[0].tenant_id] if keys else []
        return await self._locate(keys, dict.fromkeys([*tenants, SHARED_TENANT] if with_shared else tenants))

    async def locate_shared(self, keys: Sequence[ObjectKey]) -> dict[ObjectKey, Elsewhere]:
        """Which of these, which are of one tenant, other live stores have as what all tenants share."""
        return {} if keys and keys[0].tenant_id == SHARED_TENANT else await self._locate(keys, [SHARED_TENANT])

    async def _locate(self, keys: Sequence[ObjectKey], tenants: Iterable[str]) -> dict[ObjectKey, Elsewhere]:
        stores = self._stores()
        if not (keys and self.is_shared):
            return {}
        located: dict[ObjectKey, Elsewhere] = {}
        tenant_id = keys[0].tenant_id
        for tenant in tenants:
            ids = [key.chunk_id for key in keys if key not in located]
            try:
                found = await self.backend.locate(tenant, ids, stores) if ids else {}
            except Unavailable:
                return located
            for chunk_id, replicas in found.items():
                others = [each for each in replicas if each.store_id != self._name]
                if others:
                    located[ObjectKey(tenant_id, chunk_id)] = _elsewhere(others, stores)
                for each in replicas:
                    if each.store_id == self._name:  # the index may name what is here no more
                        self.unsay(each.record.key, each.tier)
        return located

    async def announce(self, record: ObjectRecord) -> bool:
        """Says that an object was stored here just now; whether that could be said. Ends the claims on it."""
        if not self.is_shared:
            return False
        await self._may_say.wait()
        try:
            await self.backend.publish([Replica(record, Tier.RAM, self._name)])
        except Unavailable:
            return False
        return True

    def say(self, key: ObjectKey, tier: Tier) -> None:
        """Says, in the background, that an object is on a tier too."""
        self.unsaid.discard((key, tier))
        if self.is_shared:
            self.in_background(self._say(key, tier))

    def unsay(self, key: ObjectKey, tier: Tier) -> None:
        """Says, in the background, that an object is on a tier no more, if that is so."""
        if self.is_shared:
            self.unsaid.add((key, tier))
            self.in_background(self._unsay(key, tier))

    async def bury(self, keys: Sequence[ObjectKey]) -> None:
        """Says that objects were deleted on purpose: stores that hold them and are away now learn of it later."""
        if self.is_shared:
            self.unburied.update(keys)
            with suppress(Unavailable):
                await self.backend.bury(keys)
                self.unburied.difference_update(keys)

    async def bury_unburied(self) -> None:
        """Says what could not be said. Raises `Unavailable`. What is stored meanwhile is stored after it."""
        keys = list(self.unburied)
        self._may_say.clear()
        try:
            await self.backend.bury(keys)
            for key, found in self._tiers.find(keys).items():
                tiers = [tier for tier in Tier if found.is_on(tier)]
                await self.backend.publish([Replica(found.record, tier, self._name) for tier in tiers])
                self.unburied.discard(key)
        finally:
            self._may_say.set()
        self.unburied.difference_update(keys)

    async def drop_buried(self, keys: Sequence[ObjectKey]) -> None:
        """Drops what was deleted on purpose while this store was away."""
        log.info("objects deleted while this store was away", num_objects=len(keys))
        await self._tiers.delete(keys)

    async def close(self) -> None:
        """Waits for what is being said."""
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    def _found_on(self, key: ObjectKey, tier: Tier) -> Found | None:
        """What this store has of it, when it is on this tier."""
        found = self._tiers.find([key]).get(key)
        return found if found is not None and found.is_on(tier) else None

    async def _say(self, key: ObjectKey, tier: Tier) -> None:
        await self._may_say.wait()
        found = self._found_on(key, tier)
        if found is None:
            return
        with suppress(Unavailable):
            replica = Replica(found.record, tier, self._name, found.usage.stored_at)
            buried = await self.backend.publish_again([replica])
            if buried:
                await self.drop_buried(buried)

    async def _unsay(self, key: ObjectKey, tier: Tier) -> None:
        if self._found_on(key, tier) is not None:  # whoever stored it again says so, or has said so
            self.unsaid.discard((key, tier))
            return
        try:
            await self.backend.withdraw(self._name, [key], tier)
        except Unavailable:
            return  # stays unsaid until it is back
        self.unsaid.discard((key, tier))
        await self._say(key, tier)  # it may have come back meanwhile; the two may have crossed

    def in_background(self, work: Coroutine[None, None, object]) -> asyncio.Task[object]:
        """Does what must be said to the end; `close` waits for it."""
        task = asyncio.get_running_loop().create_task(work, name="tell-backend")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _elsewhere(replicas: Sequence[Replica], stores: Mapping[str, str]) -> Elsewhere:
    """Each store once, with its fastest tier; `replicas` are fastest first."""
    places: dict[str, Location] = {}
    for each in replicas:
        places.setdefault(each.store_id, Location(each.store_id, stores[each.store_id], each.tier))
    is_on_disk = any(each.tier is Tier.DISK for each in replicas)
    return Elsewhere(replicas[0].record, tuple(places.values()), is_on_disk)
