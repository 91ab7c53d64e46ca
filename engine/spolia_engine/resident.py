"""Which chunks are in this node's memory, and where."""

from __future__ import annotations

from spolia_core.reuse import ChunkKind
from spolia_engine.extent import BlockState, Extent
from spolia_engine.pool import Pool
from spolia_engine.run import Run


class ResidentChunks:
    """Maps chunk ids to sealed runs. A run somebody acquired stays; others go when the pool needs room.

    Thread-safe, under the pool's lock. What `in` says may be old by the time it is read: `acquire` and `register` are
    what to act on.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._runs: dict[bytes, tuple[ChunkKind, Run]] = {}
        pool.on_evict = self._evicted

    def __contains__(self, chunk_id: bytes) -> bool:
        return chunk_id in self._runs

    def register(self, chunk_id: bytes, kind: ChunkKind, run: Run) -> bool:
        """Makes a run findable. The caller holds a reference and keeps it.

        The first run of an id stays: False when there is one already.
        """
        with self._pool.lock:
            if run.extent.state is not BlockState.REFERENCED:
                raise AssertionError(f"a run in {run.extent.state.value} memory cannot be registered")
            if chunk_id in self._runs:
                return False
            self._runs[chunk_id] = (kind, run)
            run.extent.chunk_ids.add(chunk_id)
            return True

    def acquire(self, chunk_id: bytes) -> Run | None:
        """The run of a chunk with a reference on its extent, which the caller releases; None when it is not here."""
        with self._pool.lock:
            found = self._runs.get(chunk_id)
            if found is None:
                return None
            self._pool.retain(found[1].extent)
            return found[1]

    def drop(self, chunk_id: bytes) -> bool:
        """Forgets a chunk; its memory goes with its last reader. False when it was not here."""
        with self._pool.lock:
            found = self._runs.pop(chunk_id, None)
            if found is None:
                return False
            self._pool.forget_chunk(found[1].extent, chunk_id)
            return True

    def held(self, kind: ChunkKind, limit: int = 4096) -> list[bytes]:
        """Ids of one kind, most recently registered first."""
        with self._pool.lock:
            ids = [chunk_id for chunk_id, (k, _) in reversed(self._runs.items()) if k is kind]
        return ids[:limit]

    def _evicted(self, extent: Extent) -> None:
        for chunk_id in extent.chunk_ids:
            del self._runs[chunk_id]
