"""How much work a request is before it decodes, as far as that can be said when it comes."""

from __future__ import annotations

from itertools import takewhile

from spolia_core.reuse import PREFIX_CHUNK_TOKENS, ReuseMode
from spolia_decode.job import GenerateJob
from spolia_engine.resident import ResidentChunks


def num_tokens_to_prepare(job: GenerateJob, resident: ResidentChunks) -> int:
    """Tokens of the context that are not in this node's memory now. Takes nothing, so it may have changed since.

    What is here is ready at once, so it is no queue: else a node that holds a document would look the busier for every
    request that comes because of it. Link tokens, a few for each document, are left out.
    """
    context = job.context
    if job.mode is ReuseMode.LINKED:
        return sum(
            len(part.token_ids) for part in context.parts if part.chunk_id is None or part.chunk_id not in resident
        )
    here = takewhile(resident.__contains__, job.ids.prefix_chain(context.token_ids))
    return context.num_tokens - PREFIX_CHUNK_TOKENS * sum(1 for _ in here)
