"""Settings of a decode node."""

from __future__ import annotations

from dataclasses import dataclass

from spolia_core.reuse import DEFAULT_LINK_TOKENS, DEFAULT_MIN_REUSED_TOKENS
from spolia_node.config import at_least, between, setting
from spolia_worker.config import WorkerConfig


@dataclass(frozen=True)
class DecodeConfig(WorkerConfig):
    """What a decode node may be told."""

    max_running: int = setting(64, "Sequences decoded together; more wait.", check=at_least(1))
    max_waiting: int = setting(256, "Requests that may wait for a place; more are refused.", check=at_least(0))
    link_tokens: int = setting(
        DEFAULT_LINK_TOKENS,
        "Tokens recomputed at the head of each reused chunk. More is slower and closer to exact.",
        check=at_least(0),
    )
    min_reused_tokens: int = setting(
        DEFAULT_MIN_REUSED_TOKENS,
        "Documents with fewer tokens behind their link tokens are recomputed whole: many short pieces cost more than "
        "they save.",
        check=at_least(0),
    )
    local_prefill_tokens: int = setting(
        32,
        "Exact contexts with at most this many tokens left to compute are prefilled here instead of elsewhere.",
        check=at_least(0),
    )
    prefill_share: float = setting(
        0.6, "Share of a request's remaining time that one prefill node may take.", check=between(0.05, 1.0)
    )
    publish: bool = setting(True, "Store the prefix chunks of prompts and answers, so that next turns start warm.")
