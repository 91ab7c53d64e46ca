"""What the stores of a cluster share: who holds which object, who computes which chunk, which nodes are there.

One small interface with two implementations: `EmbeddedBackend` over the store's own SQLite file, for one store alone,
and `RedisBackend`, for several. One suite of tests runs against both.

A store is the authority on what it holds; the backend is how others learn of it. Nothing is in a backend that its users
cannot say again, so losing it costs reuse across stores for a while, never data. While a backend cannot be reached its
methods raise `Unavailable` at once, and stores go on with what they hold and what they knew.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from spolia_kvstore.objects import ObjectKey, ObjectRecord, Tier


@dataclass(frozen=True, slots=True)
class Replica:
    """An object on a tier of a store: `store_id` is the store's node id.

    `stored_at`, seconds since the epoch by the store's clock, is said when it is published again; nobody is told of it.
    """

    record: ObjectRecord
    tier: Tier
    store_id: str
    stored_at: float = 0.0


@dataclass(frozen=True, slots=True)
class ClaimLease:
    """A claim that stands: who computes, and for how many seconds more."""

    owner: str
    remaining_s: float


@dataclass(frozen=True, slots=True)
class ClaimAnswer:
    """What came of asking for a claim: `is_stored`, else the `lease` that now stands, the asker's own when granted."""

    is_stored: bool = False
    lease: ClaimLease | None = None


@dataclass(frozen=True, slots=True)
class MemberLease:
    """A node of the cluster. `record` is its serialized `NodeRecord`; `session` numbers the stream it registered by."""

    node_id: str
    session: int
    record: bytes
    remaining_s: float


class Backend(Protocol):
    """See the module. Methods never block the event loop for longer than a lookup takes, and have their own deadlines.

    Replicas at stores that are not among `live_stores` do not count.
    """

    name: str
    """"sqlite" or "redis"."""

    is_shared: bool
    """Whether other stores use it too."""

    @property
    def reachable(self) -> bool:
        """Whether it answers now."""

    async def start(self) -> None:
        """Begins to keep a connection, where there is one. Does not wait for it."""

    async def close(self) -> None:
        """Lets go of everything. Idempotent."""

    # The index

    async def publish(self, replicas: Sequence[Replica]) -> None:
        """Adds or replaces replicas of objects that were just stored, and ends every claim on their keys, in this order
        or at once. Whether they were ever buried does not matter."""

    async def publish_again(self, replicas: Sequence[Replica]) -> list[ObjectKey]:
        """Adds or replaces replicas that a store has had for a while.

        Those that were buried after they were stored are not added but returned: the store was away when they were
        deleted.
        """

    async def bury(self, keys: Sequence[ObjectKey]) -> None:
        """Forgets every replica of objects that were deleted on purpose.

        Remembers that for some days, for stores that are away now.
        """

    async def withdraw(self, store_id: str, keys: Sequence[ObjectKey], tier: Tier) -> None:
        """Forgets a store's replicas on a tier; those not there are ignored."""

    async def locate(
        self, tenant_id: str, chunk_ids: Sequence[bytes], live_stores: Collection[str]
    ) -> dict[bytes, list[Replica]]:
        """Replicas of those ids that have any, fastest tier first. Changes nothing."""

    # Claims: who computes a chunk

    async def claim(
        self, keys: Sequence[ObjectKey], owner: str, ttl_s: float, live_stores: Collection[str]
    ) -> list[ClaimAnswer]:
        """Takes each claim unless the object is stored or another holds it; renews the owner's own. Atomic per key."""

    async def unclaim(self, keys: Sequence[ObjectKey], owner: str | None) -> list[bool]:
        """Ends the owner's claims, anybody's when None; whether each ended. Others' are left alone."""

    async def claims(self, keys: Sequence[ObjectKey]) -> list[ClaimLease | None]:
        """The claims that stand."""

    # Members: which nodes are there

    async def next_session(self) -> int:
        """A number larger than any it gave before, to any store."""

    async def renew_member(self, node_id: str, session: int, record: bytes, lease_s: float) -> bool:
        """Adds a member or renews its lease; false when a newer session has taken the node over."""

    async def drop_member(self, node_id: str, session: int) -> bool:
        """Removes a member that this very session holds; false when there is none."""

    async def members(self) -> list[MemberLease]:
        """Members whose lease has not run out, by node id."""

    # News

    def on_claims_ended(self, callback: Callable[[Sequence[ObjectKey]], None]) -> None:
        """`callback` is told, on the event loop, of claims that ended, here or at another store. It must not raise.

        Lapses are not told; and where the backend is away, nothing is: who waits also looks again from time to time.
        """

    def on_members_changed(self, callback: Callable[[], None]) -> None:
        """`callback` is called when members came, went or changed their record, possibly at another store."""

    def on_reconnected(self, callback: Callable[[], None]) -> None:
        """`callback` is called each time the backend can be reached again, the first time included."""
