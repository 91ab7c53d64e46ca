"""A shared backend in memory, with a switch for each store that uses it: away or reachable."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from spolia_core.errors import Unavailable
from spolia_kvstore.backend import ClaimAnswer, ClaimLease, MemberLease, Replica
from spolia_kvstore.backend_news import BackendNews
from spolia_kvstore.catalog_leases import Lease
from spolia_kvstore.objects import ObjectKey, Tier


@dataclass
class FakeShared:
    """What all stores see. `log` names the writes that reached it."""

    clock: Callable[[], float]
    replicas: dict[tuple[ObjectKey, Tier, str], Replica] = field(default_factory=dict)
    buried: dict[ObjectKey, float] = field(default_factory=dict)
    claims: dict[ObjectKey, Lease] = field(default_factory=dict)
    members: dict[str, tuple[int, bytes, float]] = field(default_factory=dict)
    last_session: int = 0
    users: list[FakeBackend] = field(default_factory=list)
    log: list[str] = field(default_factory=list)


class FakeBackend(BackendNews):
    """One store's way to it."""

    name = "fake"
    is_shared = True

    def __init__(self, shared: FakeShared) -> None:
        super().__init__()
        self.shared = shared
        self.reachable = True
        shared.users.append(self)

    def back(self) -> None:
        """It can be reached again."""
        self.reachable = True
        self.tell_reconnected()

    async def start(self) -> None:
        self.back()

    async def close(self) -> None:
        pass

    async def publish(self, replicas: Sequence[Replica]) -> None:
        self._check(f"publish {len(replicas)}")
        for each in replicas:
            self.shared.replicas[each.record.key, each.tier, each.store_id] = each
        await self.unclaim([each.record.key for each in replicas], None)

    async def publish_again(self, replicas: Sequence[Replica]) -> list[ObjectKey]:
        listed = {(key, store_id) for key, _, store_id in self.shared.replicas}
        buried = [
            each.record.key
            for each in replicas
            if each.stored_at < self.shared.buried.get(each.record.key, 0.0)
            and (each.record.key, each.store_id) not in listed
        ]
        await self.publish([each for each in replicas if each.record.key not in buried])
        return buried

    async def bury(self, keys: Sequence[ObjectKey]) -> None:
        self._check(f"bury {len(keys)}")
        self.shared.buried.update(dict.fromkeys(keys, self.shared.clock()))
        self.shared.replicas = {name: each for name, each in self.shared.replicas.items() if name[0] not in keys}

    async def withdraw(self, store_id: str, keys: Sequence[ObjectKey], tier: Tier) -> None:
        self._check(f"withdraw {len(keys)}")
        for key in keys:
            self.shared.replicas.pop((key, tier, store_id), None)

    async def locate(
        self, tenant_id: str, chunk_ids: Sequence[bytes], live_stores: Collection[str]
    ) -> dict[bytes, list[Replica]]:
        self._check("locate")
        found: dict[bytes, list[Replica]] = {}
        for (key, _, store_id), replica in sorted(self.shared.replicas.items(), key=lambda item: item[0][1:]):
            if key.tenant_id == tenant_id and key.chunk_id in chunk_ids and store_id in live_stores:
                found.setdefault(key.chunk_id, []).append(replica)
        return found

    async def claim(
        self, keys: Sequence[ObjectKey], owner: str, ttl_s: float, live_stores: Collection[str]
    ) -> list[ClaimAnswer]:
        self._check("claim")
        now, answers = self.shared.clock(), []
        for key in keys:
            if any(each[0] == key and each[2] in live_stores for each in self.shared.replicas):
                answers.append(ClaimAnswer(is_stored=True))
                continue
            standing = self.shared.claims.get(key)
            if standing is None or standing.until <= now or standing.owner == owner:
                standing = self.shared.claims[key] = Lease(key, owner, now + ttl_s)
            answers.append(ClaimAnswer(lease=ClaimLease(standing.owner, standing.until - now)))
        return answers

    async def unclaim(self, keys: Sequence[ObjectKey], owner: str | None) -> list[bool]:
        self._check("unclaim")
        ended = [key for key in keys if key in self.shared.claims and owner in (None, self.shared.claims[key].owner)]
        for key in ended:
            del self.shared.claims[key]
        for user in self.shared.users:
            user.tell_claims_ended(ended)
        return [key in ended for key in keys]

    async def claims(self, keys: Sequence[ObjectKey]) -> list[ClaimLease | None]:
        self._check("claims")
        now = self.shared.clock()
        standing = [self.shared.claims.get(key) for key in keys]
        return [
            ClaimLease(lease.owner, lease.until - now) if lease is not None and lease.until > now else None
            for lease in standing
        ]

    async def next_session(self) -> int:
        self._check("next_session")
        self.shared.last_session += 1
        return self.shared.last_session

    async def renew_member(self, node_id: str, session: int, record: bytes, lease_s: float) -> bool:
        self._check("renew_member")
        known = self.shared.members.get(node_id)
        if known is not None and known[0] > session:
            return False
        self.shared.members[node_id] = (session, record, self.shared.clock() + lease_s)
        if known is None or known[1] != record:
            self._tell_of_members()
        return True

    async def drop_member(self, node_id: str, session: int) -> bool:
        self._check("drop_member")
        known = self.shared.members.get(node_id)
        if known is None or known[0] != session:
            return False
        del self.shared.members[node_id]
        self._tell_of_members()
        return True

    async def members(self) -> list[MemberLease]:
        self._check("members")
        now = self.shared.clock()
        return [
            MemberLease(node_id, session, record, until - now)
            for node_id, (session, record, until) in sorted(self.shared.members.items())
            if until > now
        ]

    def _check(self, what: str) -> None:
        if not self.reachable:
            raise Unavailable("the fake backend is away")
        self.shared.log.append(what)

    def _tell_of_members(self) -> None:
        for user in self.shared.users:
            if user.reachable:
                user.tell_members_changed()
