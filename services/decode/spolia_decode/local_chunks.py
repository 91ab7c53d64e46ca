"""What a request has of the local chunks its prompt names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum

from spolia_core.prompt import Part
from spolia_core.reuse import MissReason, TokenSource
from spolia_engine.pool import Pool
from spolia_engine.run import Run
from spolia_worker.arriving import ArrivingChunk


class Way(IntEnum):
    """How a chunk may be brought; after one failed, the next."""

    FETCH = 0
    """From a store that has it."""
    THROUGH_STORE = 1
    """Compiled by a prefill node, and fetched from the store it put it in."""
    INLINE = 2
    """Compiled by a prefill node, and sent whole: the store cannot be had, or lost it again."""
    HERE = 3
    """Compiled by this node, unless somebody else has stored it meanwhile."""
    ALONE = 4
    """Compiled by this node, whatever a store says it has."""


@dataclass(slots=True)
class LocalChunks:
    """Chunks wanted, and the runs of those that are here or arriving, each with one reference the request owns."""

    pool: Pool
    wanted: dict[bytes, Part]
    runs: dict[bytes, Run] = field(default_factory=dict)
    sources: dict[bytes, TokenSource] = field(default_factory=dict)
    misses: dict[bytes, MissReason] = field(default_factory=dict)
    arriving: dict[bytes, ArrivingChunk] = field(default_factory=dict)
    ways: dict[bytes, Way] = field(default_factory=dict)
    _tasks: dict[bytes, asyncio.Task[None]] = field(default_factory=dict)

    @property
    def missing(self) -> list[bytes]:
        """Chunks that are neither here nor arriving, in the order of the prompt."""
        return [chunk_id for chunk_id in self.wanted if chunk_id not in self.runs]

    def lengths(self, chunk_ids: Iterable[bytes]) -> dict[bytes, int]:
        """Chunk id to tokens, of those."""
        return {chunk_id: len(self.wanted[chunk_id].token_ids) for chunk_id in chunk_ids}

    def way(self, chunk_id: bytes) -> Way:
        """How to bring it."""
        return self.ways.get(chunk_id, Way.FETCH)

    def next_way(self, chunk_id: bytes, at_least: Way) -> None:
        """One way to bring it has failed."""
        self.ways[chunk_id] = max(at_least, self.way(chunk_id))

    def add(self, chunk_id: bytes, run: Run, source: TokenSource) -> None:
        """Takes a run's reference."""
        self.runs[chunk_id] = run
        self.sources[chunk_id] = source

    def add_arriving(self, chunk: ArrivingChunk, source: TokenSource, task: asyncio.Task[None]) -> None:
        """A chunk begins to come in by `task`, which owns the chunk's own reference; the request takes another."""
        self.pool.retain(chunk.run.extent)
        self.add(chunk.chunk_id, chunk.run, source)
        self.arriving[chunk.chunk_id] = chunk
        self._tasks[chunk.chunk_id] = task

    def ready(self) -> Callable[[int], bool] | None:
        """Whether a layer of all that arrives may be read, for the engine's thread; None where nothing arrives.

        It raises `ChunkLost` when a chunk will not come.
        """
        chunks = tuple(self.arriving.values())
        return (lambda layer: all(chunk.has(layer) for chunk in chunks)) if chunks else None

    async def settle(self) -> None:
        """Waits until nothing arrives any more."""
        for task in self._tasks.values():
            await task

    @property
    def is_whole(self) -> bool:
        """After `settle`: whether all that arrived came whole."""
        return all(chunk.is_complete for chunk in self.arriving.values())

    def drop_lost(self) -> None:
        """After `settle`: what was lost on its way is missing again."""
        for chunk_id, chunk in self.arriving.items():
            if not chunk.is_complete:
                self.pool.release(self.runs.pop(chunk_id).extent)
                del self.sources[chunk_id]
        self.arriving.clear()
        self._tasks.clear()

    async def close(self) -> None:
        """Ends what is under way. References on runs stay the request's."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()

    def release(self) -> None:
        """Gives the reference on every run back."""
        for run in self.runs.values():
            self.pool.release(run.extent)
        self.runs.clear()


def chunk_id_of(part: Part) -> bytes:
    """The id of a part that is a chunk."""
    assert part.chunk_id is not None, "fragments are of chunks"
    return part.chunk_id
