"""What a cache that forgets nothing, and has everything the moment it is asked for, would find."""

from __future__ import annotations

from spolia_bench.replay.trace import BlockKey, Trace


def ideal_hits(trace: Trace, granularity_tokens: int = 1) -> list[int]:
    """Prompt tokens of each request that an earlier one began with too, in whole multiples of `granularity_tokens`.

    The last token of a prompt is never counted: it has to be computed to give the answer's first.
    """
    seen: dict[BlockKey, int] = {}
    hits = []
    for request in trace.requests:
        found, position, is_chain = 0, 0, True
        for key in request.blocks:
            size = min(trace.block_tokens, request.num_input_tokens - position)
            known = min(seen.get(key, 0), size)
            if is_chain:
                found += known
            is_chain = is_chain and known == size
            seen[key] = max(seen.get(key, 0), size)
            position += size
        usable = min(found, request.num_input_tokens - 1)
        hits.append(usable // granularity_tokens * granularity_tokens)
    return hits


def hit_rate(trace: Trace, hits: list[int]) -> float:
    """Tokens found, of all prompt tokens; 0 for an empty trace."""
    total = sum(request.num_input_tokens for request in trace.requests)
    return sum(hits) / total if total else 0.0
