"""Chunks from the pool into the store."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from spolia.v1.common_pb2 import ObjectInfo
from spolia_core.chunk_object import ChunkMeta
from spolia_core.errors import AlreadyStored, SpoliaError
from spolia_core.reuse import ChunkKind
from spolia_engine.context import release_runs
from spolia_engine.core import EngineCore
from spolia_engine.kv_bytes import run_to_object
from spolia_engine.run import Run
from spolia_node.deadline import Deadline
from spolia_node.logs import get_log
from spolia_node.rpc_messages import object_info
from spolia_node.store_client import StoreClient
from spolia_node.tracing import span
from spolia_worker.chunk_fetch import ACCEPTED_CODECS
from spolia_worker.claims import Claim

MAX_PENDING_CHUNKS = 1024
log = get_log(__name__)


@dataclass(frozen=True, slots=True)
class ChunkBytes:
    """A chunk as an object: what it is, and its bytes."""

    info: ObjectInfo
    data: bytes


class Publisher:
    """Puts runs into the store, now or in the background. Background work holds a reference on each run until done."""

    def __init__(
        self, core: EngineCore, store: StoreClient, *, timeout_s: float, max_pending_chunks: int = MAX_PENDING_CHUNKS
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

    async def to_bytes(self, chunk_id: bytes, kind: ChunkKind, run: Run, compute_s: float = 0.0) -> ChunkBytes:
        """Serialises a run off the event loop. The caller holds a reference on it meanwhile.

        `compute_s` is what computing the run took, as far as that was measured.
        """
        meta = self._core.meta(chunk_id, kind, run)
        return await asyncio.to_thread(_object_of, run, meta, compute_s)

    async def put(self, tenant_id: str, chunk: ChunkBytes, deadline: Deadline, claim: Claim | None = None) -> bool:
        """Stores a chunk and ends its claim; False when another replica was first. Raises what the store raises."""
        owner = claim.owner if claim is not None else ""
        with span("put", chunk_id=chunk.info.chunk_id.hex(), num_bytes=len(chunk.data)) as putting:
            try:
                await self._store.put(tenant_id, chunk.info, chunk.data, deadline, owner)
                is_first = True
            except AlreadyStored:
                is_first = False
            putting.set(is_first=is_first)
        if claim is not None:
            claim.settle()
        return is_first

    def publish(
        self,
        tenant_id: str,
        kind: ChunkKind,
        chunks: Sequence[tuple[bytes, Run]],
        claim: Claim | None = None,
        *,
        seconds_per_token: float = 0.0,
    ) -> None:
        """Stores what the store does not have yet, in the background. Failures cost reuse only; they are counted.

        Takes no reference of the caller's, but takes `claim`, which is on the only chunk. `seconds_per_token` is
        measured on the pass that made the chunks; 0 where it was not.
        """
        if not chunks or self.num_pending + len(chunks) > self._max_pending:
            self.num_dropped += len(chunks)
            if claim is not None:
                claim.give_back()
            return
        for _, run in chunks:
            self._core.pool.retain(run.extent)
        self.num_pending += len(chunks)
        deadline = Deadline.after(self._timeout_s)
        if claim is not None:
            claim.keep_until(deadline)
        task = asyncio.get_running_loop().create_task(
            self._publish(tenant_id, kind, chunks, claim, seconds_per_token, deadline),
            name="publish",
        )
        self._tasks.add(task)
        # Not in the task's own `finally`, which a task that is cancelled before it began never reaches.
        task.add_done_callback(partial(self._end, [run for _, run in chunks], claim))

    async def drain(self) -> None:
        """Waits until all background work is done; the caller bounds it."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def stop(self) -> None:
        """Cancels background work; its references are given back."""
        for task in list(self._tasks):
            task.cancel()
        await self.drain()

    def _end(self, runs: Sequence[Run], claim: Claim | None, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self.num_pending -= len(runs)
        release_runs(self._core.pool, runs)
        if claim is not None:
            claim.give_back()
        if not task.cancelled() and task.exception() is not None:
            log.error("publishing failed", exc_info=task.exception())

    async def _publish(
        self,
        tenant_id: str,
        kind: ChunkKind,
        chunks: Sequence[tuple[bytes, Run]],
        claim: Claim | None,
        seconds_per_token: float,
        deadline: Deadline,
    ) -> None:
        missing = list(chunks)
        try:
            ids = [chunk_id for chunk_id, _ in chunks]
            fingerprint = self._core.adapter.fingerprint
            entries = await self._store.lookup(tenant_id, ids, fingerprint, ACCEPTED_CODECS, deadline)
            missing = [c for c, entry in zip(chunks, entries, strict=True) if not entry.HasField("info")]
            while missing:
                chunk_id, run = missing[0]
                data = await self.to_bytes(chunk_id, kind, run, seconds_per_token * run.num_tokens)
                await self.put(tenant_id, data, deadline, claim)
                missing.pop(0)
        except SpoliaError as error:
            self.num_dropped += len(missing)
            log.info("chunks not published", num_chunks=len(missing), error=str(error))


def _object_of(run: Run, meta: ChunkMeta, compute_s: float) -> ChunkBytes:
    data = run_to_object(run, meta)
    return ChunkBytes(object_info(meta, data, compute_s=compute_s), data)
