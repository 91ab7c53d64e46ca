"""Keeps a store's directory and the members in its backend alike.

What is registered here is written there, at once when it changes and in time to keep its lease; what is registered with
other stores is read from there. While the backend is away each store goes on with its own members and the others it
knew. With the embedded backend this is what a restarted store remembers its members by.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from google.protobuf.message import DecodeError

from spolia.v1.directory_pb2 import NodeRecord
from spolia_core.errors import SpoliaError, Unavailable
from spolia_kvstore.backend import Backend
from spolia_kvstore.directory import Directory, RemoteLease, check_record
from spolia_node.logs import get_log

MIN_INTERVAL_S = 0.05
"""However often members change: a record with thousands of chunk ids is not free."""

log = get_log(__name__)


class MemberSync:
    """The task that does it. `on_changed` is told of every change it made, with the ids of nodes that are gone."""

    def __init__(self, directory: Directory, backend: Backend, on_changed: Callable[[Sequence[str]], None]) -> None:
        self._directory = directory
        self._backend = backend
        self._on_changed = on_changed
        self._told: dict[str, int] = {}  # sessions that the backend has from here
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        backend.on_members_changed(self._wake.set)
        backend.on_reconnected(self._wake.set)

    async def restore(self) -> None:
        """Takes up the members that the backend knows, before anybody asks. Never raises for a backend that is away."""
        with suppress(Unavailable):
            await self._pull()

    def start(self) -> None:
        """Begins. Needs a running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="member-sync")

    async def stop(self) -> None:
        """Ends. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def next_session(self) -> int:
        """The number of a new heartbeat stream; while the backend is away, one larger than any known."""
        try:
            return max(await self._backend.next_session(), self._directory.newest_session() + 1)
        except Unavailable:
            return self._directory.newest_session() + 1

    def changed(self) -> None:
        """A node registered here, changed its record or left, or its lease ran out."""
        self._wake.set()

    async def _run(self) -> None:
        lease_s = self._directory.lease_s
        while True:
            self._wake.clear()
            try:
                await self._push(lease_s)
                await self._pull()
            except Unavailable:
                self._directory.keep_remote(time.monotonic() + lease_s)
            except Exception:
                log.exception("members not exchanged with the backend")
            await asyncio.sleep(MIN_INTERVAL_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(lease_s / 3):
                    await self._wake.wait()

    async def _push(self, lease_s: float) -> None:
        here = {record.node_id for _, record in self._directory.ours()}
        for node_id in self._told.keys() - here:
            await self._backend.drop_member(node_id, self._told[node_id])
            del self._told[node_id]
        for session, record in self._directory.ours():
            self._told[record.node_id] = session
            await self._backend.renew_member(
                record.node_id, session, record.SerializeToString(deterministic=True), lease_s
            )

    async def _pull(self) -> None:
        leases = []
        for member in await self._backend.members():
            if self._told.get(member.node_id) == member.session:
                continue  # from here; one that left meanwhile must not come back by this
            try:
                record = NodeRecord.FromString(member.record)
                check_record(record)
            except (DecodeError, SpoliaError) as error:
                log.warning("member of the backend left out", node=member.node_id, error=str(error))
                continue
            leases.append(RemoteLease(record, member.session, member.remaining_s))
        before = self._directory.version
        gone = self._directory.take_remote(leases, time.monotonic())
        if self._directory.version != before:
            self._on_changed(gone)
