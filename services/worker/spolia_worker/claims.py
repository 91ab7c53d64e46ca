"""Who computes a chunk: claims in the store, so that each is computed once in the cluster (single flight)."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from enum import Enum
from itertools import count
from types import TracebackType

from spolia.v1.kvstore_pb2 import ClaimState
from spolia_core.errors import SpoliaError
from spolia_node.deadline import Deadline
from spolia_node.logs import get_log
from spolia_node.store_client import StoreClient

ANSWER_GRACE_S = 1.0
"""How much longer than the wait itself the store's answer may take."""

GIVE_BACK_TIMEOUT_S = 2.0
RENEW_TIMEOUT_S = 2.0
RENEWALS_PER_TTL = 3
"""How often a claim is asked for again while it stands: two answers may be lost before it lapses."""

MAX_REQUEST_ID_CHARS = 64  # an owner's name has 256 bytes at most

log = get_log(__name__)


class ClaimOutcome(Enum):
    """What became of asking for a claim."""

    GRANTED = "granted"
    """Ours: compute the chunk."""
    HELD = "held"
    """Another computes it, and has not finished within the wait."""
    STORED = "stored"
    """It is in the store."""
    NO_STORE = "no_store"
    """The store could not be asked, so nobody is kept from doing the same work."""


class Claim:
    """A claim that was asked for. Leaving its `with` block, or `give_back`, ends one that was granted."""

    def __init__(self, claims: ChunkClaims, tenant_id: str, chunk_id: bytes, owner: str) -> None:
        self._claims = claims
        self._tenant_id = tenant_id
        self._chunk_id = chunk_id
        self._owner = owner
        self._may_stand = True
        self._ended = asyncio.Event()
        self._until = Deadline.after(0.0)
        self._renewing: asyncio.Task[None] | None = None
        self.outcome = ClaimOutcome.NO_STORE

    @property
    def owner(self) -> str:
        """The name to put the chunk under, which ends the claim; empty when it was not granted."""
        return self._owner if self.outcome is ClaimOutcome.GRANTED else ""

    def settle(self) -> None:
        """A Put under its owner has ended it: there is nothing to give back."""
        self._may_stand = False
        self._ended.set()

    def give_back(self) -> None:
        """Ends it, in the background, so that others need not wait for it to lapse. Idempotent."""
        self._ended.set()
        if self._may_stand and self.outcome in (ClaimOutcome.GRANTED, ClaimOutcome.NO_STORE):
            self._may_stand = False
            self._claims.give_back(self._tenant_id, self._chunk_id, self._owner, self._renewing)

    def keep(self, every_s: float, until: Deadline) -> None:
        """Keeps a granted claim from lapsing while its chunk waits for its turn; not beyond its request's deadline."""
        self._until = until
        self._renewing = self._claims.begin_renewing(self._renew(every_s))

    def keep_until(self, until: Deadline) -> None:
        """Somebody else goes on with the work: it stands as long as they have time, if that is longer."""
        self._until = max(self._until, until, key=lambda deadline: deadline.at)

    async def _renew(self, every_s: float) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(every_s, self._until.remaining())):
                    await self._ended.wait()
            if self._ended.is_set() or self._until.expired:
                return
            if not await self._claims.renew(self._tenant_id, self._chunk_id, self._owner):
                return

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.give_back()


class ChunkClaims:
    """Takes claims for one node, each under an owner of its own, and owns the calls that give them back."""

    def __init__(self, store: StoreClient, node_id: str, ttl_s: float) -> None:
        self._store = store
        self._node_id = node_id
        self._ttl_ms = round(ttl_s * 1000)
        self._numbers = count(1)
        self._giving_back: set[asyncio.Task[None]] = set()
        self._renewing: set[asyncio.Task[None]] = set()

    async def take(
        self, tenant_id: str, chunk_id: bytes, request_id: str, waiting: Deadline, deadline: Deadline
    ) -> Claim:
        """Asks for a claim; while another holds it, waits until `waiting`. Never raises for what the store does."""
        # The number keeps two requests of one name apart: the store grants a claim to its owner again.
        owner = f"{self._node_id}/{request_id[:MAX_REQUEST_ID_CHARS]}#{next(self._numbers)}"
        claim = Claim(self, tenant_id, chunk_id, owner)
        try:
            claim.outcome = await self._ask(tenant_id, chunk_id, owner, waiting, deadline)
        except SpoliaError as error:
            log.info("no claim could be had", chunk_id=chunk_id.hex(), error=str(error))
        except BaseException:
            claim.give_back()  # it may have been granted all the same
            raise
        if claim.outcome is ClaimOutcome.GRANTED:
            claim.keep(self._ttl_ms / 1000 / RENEWALS_PER_TTL, deadline)
        return claim

    def give_back(self, tenant_id: str, chunk_id: bytes, owner: str, after: asyncio.Task[None] | None) -> None:
        """Ends a claim in the background, after its last renewal; where that fails the claim lapses."""
        _begin(self._unclaim(tenant_id, chunk_id, owner, after), "unclaim", self._giving_back)

    async def renew(self, tenant_id: str, chunk_id: bytes, owner: str) -> bool:
        """Asks for a claim again. False where it is not ours any more; a store that does not answer is asked again."""
        try:
            results = await self._store.claim(
                tenant_id, [chunk_id], owner, Deadline.after(RENEW_TIMEOUT_S), ttl_ms=self._ttl_ms, wait_ms=0
            )
        except SpoliaError as error:
            log.info("claim not renewed", chunk_id=chunk_id.hex(), error=str(error))
            return True
        return bool(results) and results[0].state == ClaimState.CLAIM_STATE_GRANTED

    def begin_renewing(self, renewing: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Runs a claim's renewals beside its request, until `drain` at the latest."""
        return _begin(renewing, "renew claim", self._renewing)

    async def drain(self) -> None:
        """Ends renewals, and returns when every claim that was to be given back is; a few seconds at most."""
        for task in self._renewing:
            task.cancel()
        while self._renewing | self._giving_back:
            await asyncio.gather(*self._renewing, *self._giving_back, return_exceptions=True)

    async def _ask(
        self, tenant_id: str, chunk_id: bytes, owner: str, waiting: Deadline, deadline: Deadline
    ) -> ClaimOutcome:
        answer = Deadline(min(waiting.at + ANSWER_GRACE_S, deadline.at))
        while True:
            wait_ms = round(waiting.remaining() * 1000)
            results = await self._store.claim(
                tenant_id, [chunk_id], owner, answer, ttl_ms=self._ttl_ms, wait_ms=wait_ms
            )
            state = results[0].state if results else ClaimState.CLAIM_STATE_UNSPECIFIED
            if state == ClaimState.CLAIM_STATE_GRANTED:
                return ClaimOutcome.GRANTED
            if state == ClaimState.CLAIM_STATE_STORED:
                return ClaimOutcome.STORED
            if waiting.expired:
                return ClaimOutcome.HELD

    async def _unclaim(self, tenant_id: str, chunk_id: bytes, owner: str, after: asyncio.Task[None] | None) -> None:
        if after is not None:
            await asyncio.wait([after])  # or it would claim anew what is given back
        try:
            await self._store.unclaim(tenant_id, [chunk_id], owner, Deadline.after(GIVE_BACK_TIMEOUT_S))
        except SpoliaError as error:
            log.info("claim not given back, it will lapse", chunk_id=chunk_id.hex(), error=str(error))


def _begin(work: Coroutine[None, None, None], name: str, tasks: set[asyncio.Task[None]]) -> asyncio.Task[None]:
    task = asyncio.get_running_loop().create_task(work, name=name)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task
