"""Fits a trace of large machines to this one: fewer tokens per block, later arrivals, and nothing else changed.

Every block of B tokens becomes one of B / factor, and prompts shrink alike, so which prompts share which blocks
stays as it was, and so does the share of tokens that a perfect cache finds.
"""

from __future__ import annotations

import math
from dataclasses import replace

from spolia_bench.replay.trace import Trace, TraceRequest


def scaled(trace: Trace, *, token_factor: int, stretch: float, max_context_tokens: int) -> Trace:
    """Divides token counts by about `token_factor` (a block keeps a token at least), multiplies times by `stretch`.

    Requests whose prompt and answer then exceed `max_context_tokens` are left out and counted.
    """
    block = max(1, trace.block_tokens // token_factor)
    shrink = block / trace.block_tokens
    shrunk = [_scaled(request, shrink, stretch, block) for request in trace.requests]
    kept = tuple(r for r in shrunk if r.num_input_tokens + r.num_output_tokens <= max_context_tokens)
    return Trace(block, kept, trace.num_left_out + len(shrunk) - len(kept))


def first(trace: Trace, num_requests: int) -> Trace:
    """The first requests; the clock starts with the first of them."""
    chosen = trace.requests[:num_requests]
    start_s = chosen[0].at_s if chosen else 0.0
    return replace(trace, requests=tuple(replace(request, at_s=request.at_s - start_s) for request in chosen))


def _scaled(request: TraceRequest, shrink: float, stretch: float, block: int) -> TraceRequest:
    num_input = max(1, math.ceil(request.num_input_tokens * shrink))
    return replace(
        request,
        at_s=request.at_s * stretch,
        num_input_tokens=num_input,
        num_output_tokens=max(1, math.ceil(request.num_output_tokens * shrink)),
        blocks=request.blocks[: math.ceil(num_input / block)],
    )
