"""The backend that several stores share: a Redis, or a Redis Cluster. See `redis_keys` for what is where."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from spolia_kvstore.backend import ClaimAnswer, ClaimLease, MemberLease, Replica
from spolia_kvstore.backend_news import BackendNews
from spolia_kvstore.objects import ObjectKey, Tier
from spolia_kvstore.redis_keys import RedisKeys, claim_news, claim_of_news
from spolia_kvstore.redis_link import RedisLink
from spolia_kvstore.redis_scripts import (
    BURY,
    CLAIM,
    CLAIM_LEFT,
    DROP_MEMBER,
    MEMBERS,
    NEXT_SESSION,
    PUBLISH,
    RENEW_MEMBER,
    UNCLAIM,
    call,
    command,
)
from spolia_kvstore.redis_session import Reply
from spolia_kvstore.redis_target import redis_target
from spolia_kvstore.replica_codec import VERSION, decode_replicas, encode_replica, replica_field

DEFAULT_TIMEOUT_S = 0.5
REPLICA_TTL_S = 24 * 3600.0
BURIED_TTL_S = 7 * 24 * 3600.0
"""A store that was away for longer may bring back what was deleted meanwhile."""


class RedisBackend(BackendNews):
    """`Backend` over Redis. Keys of one call are decided one by one, each at once; many keys take several round trips.

    `timeout_s` is for each round trip. An object that nobody published for `replica_ttl_s` is forgotten: stores publish
    again well before. News is told by Redis, of this store's own doing too. What was to be told while Redis was away is
    not: once it is back all is to be said and asked again.
    """

    name = "redis"
    is_shared = True

    def __init__(
        self,
        url: str,
        prefix: str = "spolia",
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        replica_ttl_s: float = REPLICA_TTL_S,
    ) -> None:
        """Connects to nothing. Raises `InvalidRequest` for a URL or prefix that is none."""
        super().__init__()
        target = redis_target(url, timeout_s)
        self._keys = RedisKeys(prefix, target.db)
        self._replica_ttl_ms = _milliseconds(replica_ttl_s)
        self._link = RedisLink(target, self._keys, timeout_s, self.tell_reconnected, self._take_news)

    @property
    def reachable(self) -> bool:
        """Whether Redis answered last time."""
        return self._link.is_up

    async def start(self) -> None:
        """Begins to connect; `on_reconnected` tells when it has."""
        self._link.start()

    async def close(self) -> None:
        """Disconnects; every method raises `Unavailable` from then on."""
        await self._link.stop()

    # The index

    async def publish(self, replicas: Sequence[Replica]) -> None:
        """One script for each object, whatever its replicas."""
        await self._publish(replicas, is_new=True)

    async def publish_again(self, replicas: Sequence[Replica]) -> list[ObjectKey]:
        """The same scripts."""
        return await self._publish(replicas, is_new=False)

    async def bury(self, keys: Sequence[ObjectKey]) -> None:
        """One script for each key. The time is Redis's; it is compared with stores' clocks only for what was stored
        while Redis was away."""
        ttl = _milliseconds(BURIED_TTL_S)
        await self._link.exchange([call(BURY, [self._keys.buried(key), self._keys.replicas(key)], ttl) for key in keys])

    async def _publish(self, replicas: Sequence[Replica], *, is_new: bool) -> list[ObjectKey]:
        """Keys that were not taken."""
        stored_at: dict[ObjectKey, float] = {}
        values: dict[ObjectKey, list[bytes]] = {}
        for each in replicas:
            pair = (replica_field(each.store_id, each.tier), encode_replica(each.record))
            values.setdefault(each.record.key, []).extend(pair)
            stored_at[each.record.key] = max(each.stored_at, stored_at.get(each.record.key, 0.0))
        taken = await self._link.exchange(
            [
                call(
                    PUBLISH,
                    [self._keys.replicas(key), self._keys.claim(key), self._keys.buried(key)],
                    *(self._replica_ttl_ms, self._keys.claims_channel, claim_news(key)),
                    "new" if is_new else round(stored_at[key] * 1000),
                    *pairs,
                )
                for key, pairs in values.items()
            ]
        )
        return [key for key, is_taken in zip(values, taken, strict=True) if not is_taken]

    async def withdraw(self, store_id: str, keys: Sequence[ObjectKey], tier: Tier) -> None:
        """One HDEL for each key."""
        field = replica_field(store_id, tier)
        await self._link.exchange([command("HDEL", self._keys.replicas(key), field) for key in keys])

    async def locate(
        self, tenant_id: str, chunk_ids: Sequence[bytes], live_stores: Collection[str]
    ) -> dict[bytes, list[Replica]]:
        """One HGETALL for each id."""
        live = frozenset(live_stores)
        keys = [ObjectKey(tenant_id, chunk_id) for chunk_id in chunk_ids]
        replies = await self._link.exchange([command("HGETALL", self._keys.replicas(key)) for key in keys])
        decoded = {key.chunk_id: decode_replicas(key, values, live) for key, values in zip(keys, replies, strict=True)}
        return {chunk_id: replicas for chunk_id, replicas in decoded.items() if replicas}

    # Claims

    async def claim(
        self, keys: Sequence[ObjectKey], owner: str, ttl_s: float, live_stores: Collection[str]
    ) -> list[ClaimAnswer]:
        """One script for each key."""
        stores = [store_id.encode() for store_id in set(live_stores)]
        args = (owner.encode(), _milliseconds(ttl_s), VERSION)
        replies = await self._link.exchange(
            [call(CLAIM, [self._keys.replicas(key), self._keys.claim(key)], *args, *stores) for key in keys]
        )
        return [
            ClaimAnswer(is_stored=True) if is_stored else ClaimAnswer(lease=_claim_lease(lease))
            for is_stored, *lease in replies
        ]

    async def unclaim(self, keys: Sequence[ObjectKey], owner: str | None) -> list[bool]:
        """One script for each key."""
        whose = () if owner is None else (owner.encode(),)
        replies = await self._link.exchange(
            [call(UNCLAIM, [self._keys.claim(key)], self._keys.claims_channel, claim_news(key), *whose) for key in keys]
        )
        return [bool(reply) for reply in replies]

    async def claims(self, keys: Sequence[ObjectKey]) -> list[ClaimLease | None]:
        """One script for each key."""
        replies = await self._link.exchange([call(CLAIM_LEFT, [self._keys.claim(key)]) for key in keys])
        return [None if reply is None else _claim_lease(reply) for reply in replies]

    # Members

    async def next_session(self) -> int:
        """Microseconds since the epoch by Redis's clock, or one more than the last."""
        (session,) = await self._link.exchange([call(NEXT_SESSION, [self._keys.member("session")])])
        return int(session)

    async def renew_member(self, node_id: str, session: int, record: bytes, lease_s: float) -> bool:
        """Leases run by Redis's clock: those of stores do not matter."""
        args = (node_id.encode(), session, record, _milliseconds(lease_s), self._keys.members_channel)
        (is_taken,) = await self._link.exchange([call(RENEW_MEMBER, self._member_keys(), *args)])
        return bool(is_taken)

    async def drop_member(self, node_id: str, session: int) -> bool:
        """Others learn of it at once."""
        args = (node_id.encode(), session, self._keys.members_channel)
        (was_there,) = await self._link.exchange([call(DROP_MEMBER, self._member_keys(), *args)])
        return bool(was_there)

    async def members(self) -> list[MemberLease]:
        """Forgets those whose lease ran out, and tells of it: whoever asks first, for all."""
        (members,) = await self._link.exchange([call(MEMBERS, self._member_keys(), self._keys.members_channel)])
        leases = [
            MemberLease(node_id.decode(), int(session), record, remaining_ms / 1000)
            for node_id, session, record, remaining_ms in members
        ]
        return sorted(leases, key=lambda lease: lease.node_id)

    def _member_keys(self) -> list[str]:
        return [self._keys.member("records"), self._keys.member("expiries")]

    def _take_news(self, channel: bytes, payload: bytes) -> None:
        if channel == self._keys.members_channel.encode():
            self.tell_members_changed()
        elif (key := claim_of_news(payload)) is not None:
            self.tell_claims_ended([key])


def _claim_lease(reply: Reply) -> ClaimLease:
    owner, remaining_ms = reply
    return ClaimLease(owner.decode(), max(0, remaining_ms) / 1000)


def _milliseconds(seconds: float) -> int:
    return max(1, math.ceil(seconds * 1000))
