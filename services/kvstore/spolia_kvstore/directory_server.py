"""DirectoryService: heartbeats in, snapshots out. The clock of the pure `Directory` is kept here."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc

from spolia.v1 import directory_pb2, directory_pb2_grpc
from spolia_core.errors import DeadlineExceeded, Forbidden, InvalidRequest
from spolia_kvstore.backend import Backend
from spolia_kvstore.directory import Directory
from spolia_kvstore.member_sync import MemberSync
from spolia_node.guard import peer_role
from spolia_node.logs import get_log

SERVICE = directory_pb2.DESCRIPTOR.services_by_name["DirectoryService"].full_name
MIN_SNAPSHOT_INTERVAL_S = 0.1

log = get_log(__name__)


class DirectoryServer(directory_pb2_grpc.DirectoryServiceServicer):
    """The service over one `Directory`. Call `start` once the loop runs, and `close` before the server stops."""

    def __init__(
        self, directory: Directory, backend: Backend, on_left: Callable[[str], None] = lambda node_id: None
    ) -> None:
        """`on_left` is told the id of every node that leaves, or whose lease runs out. It must not raise."""
        self._directory = directory
        self._on_left = on_left
        self._sync = MemberSync(directory, backend, self._on_remote_change)
        self._changed = asyncio.Event()
        self._closing = asyncio.Event()
        self._sweeper: asyncio.Task[None] | None = None

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service to a server that has not started."""
        directory_pb2_grpc.add_DirectoryServiceServicer_to_server(self, server)

    async def start(self) -> None:
        """Takes up the members that the backend knows; starts ending leases that run out."""
        await self._sync.restore()
        self._sync.start()
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep(), name="directory-sweeper")

    async def close(self) -> None:
        """Ends every stream, so that nodes look for the directory elsewhere. Idempotent."""
        self._closing.set()
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
            self._sweeper = None
        await self._sync.stop()

    async def Register(
        self, request_iterator: AsyncIterator[directory_pb2.RegisterRequest], context: Any
    ) -> AsyncIterator[directory_pb2.RegisterResponse]:
        """Keeps a node registered while its stream lives and its heartbeats come."""
        session = await self._sync.next_session()
        role = peer_role(context)
        node_id = ""
        requests = aiter(request_iterator)
        try:
            while (request := await self._next_until_closing(requests)) is not None:
                self._check_own(role, request.record)
                node_id = self._renewed(session, node_id, request)
                yield directory_pb2.RegisterResponse(lease_ms=round(self._directory.lease_s * 1000))
        finally:
            self._leave(session)

    async def Watch(
        self, request: directory_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[directory_pb2.WatchResponse]:
        """Streams snapshots of the roles asked for."""
        roles = frozenset(request.roles)
        sent: directory_pb2.WatchResponse | None = None
        while not self._closing.is_set():
            changed = self._changed
            snapshot = directory_pb2.WatchResponse(nodes=self._directory.nodes(roles))
            if snapshot != sent:
                yield snapshot
                sent = snapshot
                if await self._closed_within(MIN_SNAPSHOT_INTERVAL_S):
                    return
            await self._first_of(changed, self._closing)

    def _check_own(self, role: str, record: directory_pb2.NodeRecord) -> None:
        """Raises `Forbidden` when a node with a certificate of `role` says that it is, or takes the id of, another.

        Empty where callers show no certificates.
        """
        known = self._directory.role_of(record.node_id)
        claimed = {record.role} | ({known} if known is not None else set())
        if role and claimed != {directory_pb2.NodeRole.Value(f"NODE_ROLE_{role.upper()}")}:
            names = ", ".join(sorted(_role_name(number) for number in claimed))
            log.warning("registration refused", role=role, node=record.node_id, claimed=names)
            raise Forbidden(
                f"a certificate of {role} cannot register {record.node_id!r} as {names}",
                field="record.role",
                limit=role,
            )

    def _renewed(self, session: int, node_id: str, request: directory_pb2.RegisterRequest) -> str:
        if not request.HasField("record"):
            raise InvalidRequest("every heartbeat carries the record", field="record")
        if node_id and request.record.node_id != node_id:
            raise InvalidRequest("a heartbeat stream belongs to one node", field="record.node_id", limit=node_id)
        before = self._directory.version
        self._directory.renew(session, request.record, time.monotonic())
        if not node_id:
            log.info("node registered", node=request.record.node_id, address=request.record.address)
            self._sync.changed()  # also one that comes from another directory as it was
        if self._directory.version != before:
            self._sync.changed()
            self._notify()
        return request.record.node_id

    def _leave(self, session: int) -> None:
        left = self._directory.leave(session)
        if left:
            log.info("node left", nodes=left)
        self._tell_of(left)

    def _tell_of(self, left: Sequence[str]) -> None:
        for node_id in left:
            self._on_left(node_id)
        if left:
            self._sync.changed()
            self._notify()

    def _on_remote_change(self, gone: Sequence[str]) -> None:
        if gone:
            log.info("nodes of other directories left", nodes=gone)
        self._tell_of(gone)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _sweep(self) -> None:
        while True:
            # A lease granted meanwhile is not shorter than the one slept for, so nothing has to wake this early.
            expiry = self._directory.next_expiry()
            now = time.monotonic()
            await asyncio.sleep(self._directory.lease_s if expiry is None else max(0.01, expiry - now))
            gone = self._directory.expire(time.monotonic())
            if gone:
                log.warning("leases ran out", nodes=gone, num_nodes_left=len(self._directory))
            self._tell_of(gone)

    async def _next_until_closing(
        self, requests: AsyncIterator[directory_pb2.RegisterRequest]
    ) -> directory_pb2.RegisterRequest | None:
        reading = asyncio.ensure_future(anext(requests, None))
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            lease_s = self._directory.lease_s
            done, _ = await asyncio.wait([reading, closing], timeout=lease_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise DeadlineExceeded(f"no heartbeat within the lease of {lease_s} s; register again")
            return reading.result() if reading in done else None
        finally:
            for task in (reading, closing):
                task.cancel()

    async def _closed_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        return self._closing.is_set()

    async def _first_of(self, *events: asyncio.Event) -> None:
        waits = [asyncio.ensure_future(event.wait()) for event in events]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


def _role_name(number: int) -> str:
    known = directory_pb2.NodeRole.values()
    return directory_pb2.NodeRole.Name(directory_pb2.NodeRole.ValueType(number)) if number in known else str(number)
