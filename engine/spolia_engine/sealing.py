"""Prefix chunks of what was computed anyway: a prompt's live run as it lies, an answer's blocks as one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile

from spolia_core.errors import Busy
from spolia_core.reuse import PREFIX_CHUNK_TOKENS, ChunkKind
from spolia_engine.context import Context
from spolia_engine.resident import ResidentChunks
from spolia_engine.run import Run, copy_kv
from spolia_engine.sequence import Sequence as DecodeSequence


def register_prefix(resident: ResidentChunks, context: Context, chain: Sequence[bytes]) -> list[tuple[bytes, Run]]:
    """Registers the full blocks of a context's live run; see `EngineCore.register_prefix`."""
    assert context.is_exact, "KV behind moved chunks is no prefix chunk"
    live = context.spans[-1].run
    found: list[tuple[bytes, Run]] = []
    for index in range(live.rope_base // PREFIX_CHUNK_TOKENS, len(chain)):
        offset = index * PREFIX_CHUNK_TOKENS - live.rope_base
        if offset < 0 or offset + PREFIX_CHUNK_TOKENS > live.num_tokens:
            continue
        run = Run(live.extent, live.start + offset, PREFIX_CHUNK_TOKENS, live.rope_base + offset)
        if resident.register(chain[index], ChunkKind.PREFIX, run):
            found.append((chain[index], run))
    return found


@dataclass(frozen=True, slots=True)
class SealedBlock:
    """A chunk at its place in a context: `num_tokens` tokens from `position` on."""

    chunk_id: bytes
    position: int
    num_tokens: int
    kind: ChunkKind

    @property
    def end(self) -> int:
        """Position behind its last token."""
        return self.position + self.num_tokens


def prefix_blocks(chain: Sequence[bytes], first: int = 0) -> list[SealedBlock]:
    """The blocks of a chain of prefix chunk ids, from number `first` on."""
    return [
        SealedBlock(chain[index], index * PREFIX_CHUNK_TOKENS, PREFIX_CHUNK_TOKENS, ChunkKind.PREFIX)
        for index in range(first, len(chain))
    ]


def seal_answer(
    resident: ResidentChunks, sequence: DecodeSequence, blocks: Sequence[SealedBlock]
) -> list[tuple[bytes, Run]]:
    """Copies and registers the blocks that an answer completed; see `EngineCore.seal_answer`."""
    pool, is_exact = sequence.context.pool, sequence.context.is_exact
    assert is_exact or all(b.kind is ChunkKind.LINKED for b in blocks), "KV behind moved chunks is no prefix chunk"
    left = list(dropwhile(lambda block: block.chunk_id in resident, blocks))
    if not left:
        return []
    base, end = left[0].position, left[-1].end
    assert end <= sequence.position, "blocks can be sealed only as far as KV was computed"
    try:
        extent = pool.allocate(end - base)
    except Busy:
        return []
    copy_kv([*sequence.context.spans, sequence.tail.span], extent, base, end)
    sealed: list[tuple[bytes, Run]] = []
    for block in left:
        run = Run(extent, block.position - base, block.num_tokens, block.position)
        if resident.register(block.chunk_id, block.kind, run):
            sealed.append((block.chunk_id, run))
    if not sealed:
        pool.release(extent)
    return sealed
