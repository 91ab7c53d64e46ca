"""Prefix chunks of what was computed anyway: a prompt's live run as it lies, an answer's blocks as one copy."""

from __future__ import annotations

from collections.abc import Sequence

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


def seal_answer(resident: ResidentChunks, sequence: DecodeSequence, chain: Sequence[bytes]) -> list[tuple[bytes, Run]]:
    """Copies and registers the blocks that an answer completed; see `EngineCore.seal_answer`."""
    pool = sequence.context.pool
    assert sequence.context.is_exact, "KV behind moved chunks is no prefix chunk"
    first = sequence.num_context_tokens // PREFIX_CHUNK_TOKENS
    while first < len(chain) and chain[first] in resident:
        first += 1
    base, end = first * PREFIX_CHUNK_TOKENS, len(chain) * PREFIX_CHUNK_TOKENS
    assert end <= sequence.position, "blocks can be sealed only as far as KV was computed"
    if base >= end:
        return []
    try:
        extent = pool.allocate(end - base)
    except Busy:
        return []
    copy_kv([*sequence.context.spans, sequence.tail.span], extent, base, end)
    sealed: list[tuple[bytes, Run]] = []
    for index in range(first, len(chain)):
        position = index * PREFIX_CHUNK_TOKENS
        run = Run(extent, position - base, PREFIX_CHUNK_TOKENS, position)
        if resident.register(chain[index], ChunkKind.PREFIX, run):
            sealed.append((chain[index], run))
    if not sealed:
        pool.release(extent)
    return sealed
