"""What is kept of an answer: its prefix chunks, so that the next turn of a chat starts warm."""

from __future__ import annotations

import asyncio

from spolia_core.reuse import PREFIX_CHUNK_TOKENS, ChunkKind, ReuseMode
from spolia_decode.job import GenerateJob
from spolia_decode.node_parts import NodeParts
from spolia_engine.run import Run
from spolia_engine.sealing import prefix_blocks
from spolia_engine.sequence import Sequence


def offer_check(job: GenerateJob, sequence: Sequence, parts: NodeParts) -> None:
    """Lets a finished request, still open, be checked where this node checks any."""
    if parts.shadow is not None:
        parts.shadow.offer(job, sequence)


class AnswerSealer:
    """Called in the engine's thread with a finished sequence; stores what it sealed from the event loop.

    Answers of LINKED requests stand behind moved chunks and are no prefix chunks: they are not kept.
    """

    def __init__(self, job: GenerateJob, parts: NodeParts) -> None:
        self._job = job
        self._parts = parts
        self._loop = asyncio.get_running_loop()

    def __call__(self, sequence: Sequence) -> None:
        """Seals the blocks that prompt and answer filled."""
        job = self._job
        offer_check(job, sequence, self._parts)
        if job.mode is not ReuseMode.EXACT:
            return
        with_kv = job.prompt.token_ids + sequence.generation.token_ids[:-1]
        first = sequence.num_context_tokens // PREFIX_CHUNK_TOKENS
        blocks = prefix_blocks(list(job.ids.prefix_chain(with_kv)), first)
        sealed = self._parts.core.seal_answer(sequence, blocks)
        if sealed:
            self._loop.call_soon_threadsafe(self._publish, sealed)

    def _publish(self, sealed: list[tuple[bytes, Run]]) -> None:
        if self._parts.config.publish:
            self._parts.publisher.publish(self._job.tenant_id, ChunkKind.PREFIX, sealed)
        self._parts.core.pool.release(sealed[0][1].extent)  # the one reference they share
