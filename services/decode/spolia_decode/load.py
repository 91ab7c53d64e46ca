"""How much work a request is before it decodes, as far as that can be said when it comes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from spolia_core.ids import IdSpace
from spolia_core.reuse import PREFIX_CHUNK_TOKENS, ReuseMode
from spolia_decode.job import GenerateJob
from spolia_engine.resident import ResidentChunks


def num_tokens_to_prepare(job: GenerateJob, resident: ResidentChunks) -> int:
    """Tokens of the context that are not in this node's memory now. Takes nothing, so it may have changed since.

    Behind the first document of a LINKED one, live tokens count, though linked chunks of them may be here.

    What is here is ready at once, so it is no queue: else a node that holds a document would look the busier for every
    request that comes because of it. Link tokens, a few for each document, are left out.
    """
    context = job.context
    if job.mode is not ReuseMode.LINKED:
        return context.num_tokens - _num_prefix_tokens(context.token_ids, job.ids, resident)
    head = [token for part in takewhile(lambda p: p.chunk_id is None, context.parts) for token in part.token_ids]
    num_live = sum(len(part.token_ids) for part in context.parts if part.chunk_id is None)
    missing = {part.chunk_id: len(part.token_ids) for part in context.parts if part.chunk_id is not None}
    num_missing = sum(length for chunk_id, length in missing.items() if chunk_id not in resident)
    return num_live + num_missing - _num_prefix_tokens(head, job.ids, resident)


def _num_prefix_tokens(token_ids: Sequence[int], ids: IdSpace, resident: ResidentChunks) -> int:
    """Tokens of the longest leading run of prefix chunks that is here."""
    return PREFIX_CHUNK_TOKENS * sum(1 for _ in takewhile(resident.__contains__, ids.prefix_chain(token_ids)))
