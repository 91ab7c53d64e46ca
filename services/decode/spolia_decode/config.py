"""Settings of a decode node."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spolia_core.link_policy import MAX_LINK_TOKENS
from spolia_core.reuse import DEFAULT_MIN_REUSED_TOKENS
from spolia_node.config import at_least, between, one_of, setting
from spolia_worker.config import WorkerConfig

DEFAULT_TABLES_DIR = Path("~/.cache/spolia")


@dataclass(frozen=True)
class DecodeConfig(WorkerConfig):
    """What a decode node may be told."""

    max_running: int = setting(
        64,
        "Sequences that run at once, each sample of a request being one, as far as the pool has blocks for them; more "
        "wait. A request with more samples than that runs alone.",
        check=at_least(1),
    )
    deterministic: bool = setting(
        False,
        "Take each sequence's steps alone: behind the same KV the same seed then gives the same answer, whoever "
        "is served beside it. Costs what batching gains.",
    )
    max_waiting: int = setting(256, "Requests that may wait for a place; more are refused.", check=at_least(0))
    link_tokens: int | None = setting(
        None,
        "Tokens recomputed at the head of each reused chunk; none: as the model's profile says, or 16. More is slower "
        'and closer to exact. Set by hand it overrides the profile, its refusal included; answers then say "manual".',
        check=between(0, MAX_LINK_TOKENS),
    )
    min_reused_tokens: int = setting(
        DEFAULT_MIN_REUSED_TOKENS,
        "Documents with fewer tokens behind their link tokens are recomputed whole: many short pieces cost more than "
        f'they save. Below {DEFAULT_MIN_REUSED_TOKENS}, with which profiles are calibrated, answers say "manual".',
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
    cost_gate: bool = setting(
        True,
        "Compute stored documents instead of fetching them where that was measured to be faster. Turn it off where "
        "the engine must not be used for what a store has.",
    )
    link_on_prefill: bool = setting(
        True,
        "Let prefill nodes that hold the documents link prompts with long live parts, where that is expected to cost "
        "less than keeping those that decode here waiting.",
    )
    sharing: str = setting(
        "measured",
        "Whether sequences that read the same KV attend it together. measured: where that was measured to be faster "
        "on this device; always; never.",
        check=one_of("measured", "always", "never"),
    )
    tables_dir: Path = setting(
        DEFAULT_TABLES_DIR,
        "Directory that keeps what was measured of this device, so that a start need not measure it again.",
    )
    publish: bool = setting(True, "Store the prefix chunks of prompts and answers, so that next turns start warm.")
    shadow_share: float = setting(
        0.0,
        "Share of LINKED requests recomputed exactly while the node is idle; metrics say how far the answers lie from "
        "exact ones. Checks use free memory only, unless shadow_evict says otherwise. 0: none.",
        check=between(0.0, 1.0),
    )
    shadow_evict: bool = setting(
        False,
        "Let a shadow check push out cached KV that was used longest ago, as much as its own request is long. Set it "
        "where the pool is full of cached text: checks find no free memory there and end as no_room.",
    )
    shadow_queue: int = setting(
        8,
        "Shadow checks that may wait; more are dropped. Each keeps what its request read in memory.",
        check=at_least(1),
    )
    shadow_max_tokens: int = setting(
        4096, "Requests with more tokens of prompt and answer than this are not checked.", check=at_least(2)
    )
    shadow_slice_tokens: int = setting(
        256,
        "Tokens a shadow check computes at a time: a request that arrives waits for one such slice at most.",
        check=at_least(1),
    )
    shadow_max_kl: float = setting(
        0.0,
        "Mean KL divergence per answer token, in nats over the last checks of a profile, above which the node warns in "
        "its log; 0: never.",
        check=at_least(0.0),
    )
