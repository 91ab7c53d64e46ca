"""Chunks from the pool into the store."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from spolia.v1.common_pb2 import ObjectInfo
from spolia_core.errors import AlreadyStored, SpoliaError
from spolia_core.reuse import ChunkKind
from spolia_engine.core import EngineCore
from spolia_engine.kv_bytes import run_to_object
from spolia_engine.run import Run
from spolia_node.deadline import Deadline
from spolia_node.logs import get_log
from spolia_node.rpc_messages import object_info
from spolia_node.store_client import StoreClient
from spolia_worker.chunk_fetch import ACCEPTED_CODECS

log = get_log(__name__)


@dataclass(frozen=True, slots=True)
class ChunkBytes:
    """A chunk as an object: what it is, and its bytes."""

    info: ObjectInfo
    data: bytes


class Publisher:
    """Puts runs into the store, now or in the background. Background work holds a reference on each run until done."""

    def __init__(
        self, core: EngineCore, store: StoreClient, *, timeout_s: float, max_pending_chunks: int = 1024
    ) -> None:
        self._core = core
        self._store = store
        self._timeout_s = timeout_s
        self._max_pending = max_pending_chunks
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_pending = 0
        """Chunks on their way."""
        self.num_dropped = 0
        """Chunks not published because too many were on their way, or the store could not take them."""

    async def to_bytes(self, chunk_id: bytes, kind: ChunkKind, run: Run) -> ChunkBytes:
        """Serialises a run off the event loop. The caller holds a reference on it meanwhile."""
        meta = self._core.meta(chunk_id, kind, run)
        data = await asyncio.to_thread(run_to_object, run, meta)
        return ChunkBytes(object_info(meta, data), data)

    async def put(self, tenant_id: str, chunk: ChunkBytes, deadline: Deadline, claim_owner: str = "") -> bool:
        """Stores a chunk; False when another replica was first. Raises what the store raises."""
        try:
            await self._store.put(tenant_id, chunk.info, chunk.data, deadline, claim_owner)
        except AlreadyStored:
            return False
        return True

    def publish(
        self, tenant_id: str, kind: ChunkKind, chunks: Sequence[tuple[bytes, Run]], claim_owner: str = ""
    ) -> None:
        """Stores what the store does not have yet, in the background. Failures cost reuse only; they are counted.

        Takes no reference of the caller's. `claim_owner` names the owner of claims that the puts end.
        """
        if not chunks:
            return
        if self.num_pending + len(chunks) > self._max_pending:
            self.num_dropped += len(chunks)
            return
        for _, run in chunks:
            self._core.pool.retain(run.extent)
        self.num_pending += len(chunks)
        task = asyncio.get_running_loop().create_task(
            self._publish(tenant_id, kind, list(chunks), claim_owner), name="publish"
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self) -> None:
        """Waits until all background work is done; the caller bounds it."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def stop(self) -> None:
        """Cancels background work; its references are given back."""
        for task in list(self._tasks):
            task.cancel()
        await self.drain()

    async def _publish(
        self, tenant_id: str, kind: ChunkKind, chunks: list[tuple[bytes, Run]], claim_owner: str
    ) -> None:
        deadline = Deadline.after(self._timeout_s)
        try:
            ids = [chunk_id for chunk_id, _ in chunks]
            fingerprint = self._core.adapter.fingerprint
            entries = await self._store.lookup(tenant_id, ids, fingerprint, ACCEPTED_CODECS, deadline)
            for (chunk_id, run), entry in zip(chunks, entries, strict=True):
                if not entry.HasField("info"):
                    await self.put(tenant_id, await self.to_bytes(chunk_id, kind, run), deadline, claim_owner)
        except SpoliaError as error:
            self.num_dropped += len(chunks)
            log.info("chunks not published", num_chunks=len(chunks), error=str(error))
        finally:
            self.num_pending -= len(chunks)
            for _, run in chunks:
                self._core.pool.release(run.extent)
