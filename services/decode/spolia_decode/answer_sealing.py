"""What is kept of an answer: its prefix chunks, so that the next turn of a chat starts warm."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from spolia_core.reuse import ChunkKind
from spolia_decode.continuation import Continuation
from spolia_decode.job import GenerateJob
from spolia_decode.node_parts import NodeParts
from spolia_engine.context import release_runs
from spolia_engine.run import Run
from spolia_engine.sealing import SealedBlock
from spolia_engine.sequence import Sequence


class AnswerSealer:
    """Called in the engine's thread with a finished sequence; stores what it sealed from the event loop.

    Behind moved chunks an answer's blocks are linked chunks; the chain before them is stored with them, since without
    it nobody could use them.
    """

    def __init__(
        self, job: GenerateJob, parts: NodeParts, continuation: Continuation | None, *, offers_check: bool = True
    ) -> None:
        """`offers_check`: this sequence speaks for its request where requests are checked."""
        self._job = job
        self._offers_check = offers_check
        self._parts = parts
        self._continuation = continuation
        self._loop = asyncio.get_running_loop()

    def __call__(self, sequence: Sequence) -> None:
        """Seals the blocks that the answer completed."""
        if self._offers_check and self._parts.shadow is not None:
            self._parts.shadow.offer(self._job, sequence)
        if self._continuation is None:
            return
        # The received tokens of a replay stand in its context; the last token drawn has no KV.
        answer_ids = sequence.generation.token_ids[len(self._job.received_ids) : -1]
        blocks = self._continuation.blocks(answer_ids)
        if not blocks:
            return
        sealed = self._parts.core.seal_answer(sequence, blocks)
        if sealed:
            self._loop.call_soon_threadsafe(self._publish, blocks[0].kind, sealed)

    def _publish(self, kind: ChunkKind, sealed: list[tuple[bytes, Run]]) -> None:
        assert self._continuation is not None, "something was sealed"
        if self._parts.config.publish:
            publish_resident(self._parts, self._job, kind, self._continuation.earlier)
            self._parts.publisher.publish(self._job.tenant_id, kind, sealed)
        self._parts.core.pool.release(sealed[0][1].extent)  # the one reference they share


def publish_resident(parts: NodeParts, job: GenerateJob, kind: ChunkKind, blocks: Iterable[SealedBlock]) -> None:
    """Stores, in the background, those of the chunks that are still in memory."""
    resident = parts.core.resident
    runs = [(block.chunk_id, run) for block in blocks if (run := resident.acquire(block.chunk_id)) is not None]
    parts.publisher.publish(job.tenant_id, kind, runs)
    release_runs(parts.core.pool, [run for _, run in runs])
