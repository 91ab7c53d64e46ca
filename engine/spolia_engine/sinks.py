"""Dummy sinks: tokens a local chunk is compiled behind, so that its own first tokens do not become attention sinks.

Whatever tokens come first in a sequence draw attention that means nothing. In a chunk compiled alone its own first
tokens take that role, which behind other text they would not have. s begin-of-sequence tokens at positions -s … -1 take
it instead, and are dropped when the chunk is compiled. Source: EPIC (2410.15332) §4, LegoLink-0.
"""

from __future__ import annotations

from spolia_core.errors import InvalidRequest, NotSupported
from spolia_engine.adapter import ModelAdapter


def sink_token_ids(adapter: ModelAdapter, num_sink_tokens: int) -> tuple[int, ...]:
    """The dummy tokens before every local chunk of a recipe.

    Raises `InvalidRequest` for a negative number or one that leaves no room in the model's context, `NotSupported` for
    sinks of a model without a begin-of-sequence token.
    """
    limit = adapter.max_context_tokens
    if not 0 <= num_sink_tokens < limit:
        raise InvalidRequest(
            f"num_sink_tokens is {num_sink_tokens}, outside 0 … {limit - 1}",
            field="num_sink_tokens",
            limit=f"0 … {limit - 1}",
            actual=str(num_sink_tokens),
        )
    if num_sink_tokens == 0:
        return ()
    if adapter.bos_token_id is None:
        raise NotSupported(
            "config: bos_token_id names no token; dummy sinks are begin-of-sequence tokens, so this model has none",
            field="num_sink_tokens",
            limit="0",
            actual=str(num_sink_tokens),
        )
    return (adapter.bos_token_id,) * num_sink_tokens
