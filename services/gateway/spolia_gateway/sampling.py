"""Sampling parameters as a client states them, and what an unset one becomes."""

from __future__ import annotations

import secrets
from dataclasses import replace

from spolia.v1 import common_pb2
from spolia_core.errors import ContextTooLong
from spolia_core.sampling import SamplingParams
from spolia_node.rpc_messages import sampling_from_pb

SEED_BITS = 63
"""Bits of a seed drawn here: every client language reads it back as a signed 64-bit number."""


def read_sampling(message: common_pb2.SamplingParams) -> SamplingParams:
    """The parameters as given, with a drawn seed where none is. Raises `InvalidRequest` for the first bad value."""
    return sampling_from_pb(message, default_seed=secrets.randbits(SEED_BITS))


def fit_max_tokens(
    sampling: SamplingParams, *, stated: bool, num_prompt_tokens: int, max_context_tokens: int
) -> SamplingParams:
    """Keeps `max_tokens` within what the prompt leaves of the context.

    A default shrinks to what is left. A number the client `stated` is never changed: `InvalidRequest`, with both
    numbers, when it does not fit.
    """
    room = max_context_tokens - num_prompt_tokens
    if sampling.max_tokens <= room:
        return sampling
    if stated:
        raise ContextTooLong(
            f"the prompt's {num_prompt_tokens} tokens and max_tokens {sampling.max_tokens} exceed this model's context "
            f"of {max_context_tokens} tokens",
            field="sampling.max_tokens",
            limit=f"{room} behind this prompt",
            actual=str(sampling.max_tokens),
        )
    return replace(sampling, max_tokens=room)
