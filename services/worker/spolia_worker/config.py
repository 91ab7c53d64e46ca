"""Settings of a node with an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spolia_engine.pool import DEFAULT_BLOCK_SIZE
from spolia_engine.slot_memory import DEVICE_BLOCK_SIZE
from spolia_node.config import NodeConfig, at_least, between, one_of, setting

DEFAULT_SLICE_TOKENS = 256
"""Measured with 50 M parameters on one CPU core: a prompt of 2048 or 6144 tokens takes no longer in slices of 256 than
at once (−7 %, −4 %), up to 7 % longer in slices of 128. A slice takes 0.5 to 0.7 s there."""


@dataclass(frozen=True)
class WorkerConfig(NodeConfig):
    """Settings that prefill and decode nodes have in common."""

    model: str = setting("", "Hugging Face-format directory of the model to serve. Required.")
    model_name: str = setting("", "Name users ask for; empty: the directory's name.")
    dtype: str = setting(
        "float32",
        "Compute dtype. float32 is fastest on most CPUs; take bfloat16 on a GPU.",
        check=one_of("float32", "bfloat16", "float16"),
    )
    profile_dir: Path | None = setting(
        None,
        "Directory of calibration profiles, which win over the one in the model's directory. The same profiles must "
        "be on every prefill and decode node.",
    )
    device: str = setting("cpu", "Torch device to compute on.")
    max_context_tokens: int = setting(0, "Longest context to serve; 0: the model's own limit.", check=at_least(0))
    pool_bytes: int = setting(
        1 << 30,
        "Memory for KV. Raise it until the machine is full: what is cached need not be fetched. On a GPU it is taken "
        "whole at start.",
        check=at_least(1 << 20),
    )
    block_size: int = setting(
        0,
        f"Tokens per block of the pool's ledger; 0: {DEFAULT_BLOCK_SIZE}, and {DEVICE_BLOCK_SIZE} on a GPU, where "
        "it is a page, a power of two.",
        check=at_least(0),
    )
    threads: int = setting(0, "Torch threads; 0: torch's own choice.", check=at_least(0))
    slice_tokens: int = setting(
        DEFAULT_SLICE_TOKENS,
        "Tokens of a prompt computed at a time; others wait for one such slice. Raise it on a GPU, as far as a decode "
        "step may wait: small slices leave it idle.",
        check=at_least(16),
    )
    stall_limit_s: float = setting(
        60.0, "A computation that runs longer than this makes the node NOT_SERVING.", check=at_least(0.1)
    )
    store_share: float = setting(
        0.3, "Share of a request's remaining time that may be spent waiting for the store.", check=between(0.0, 1.0)
    )
    claim_ttl_s: float = setting(30.0, "How long a claim on a chunk holds while it is computed.", check=at_least(0.1))
