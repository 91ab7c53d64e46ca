"""Loads the engine a node serves, and the profile it serves by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from spolia_core.errors import InvalidRequest
from spolia_core.link_terms import LinkTerms
from spolia_core.profile import MANUAL_PROFILE, find_profile
from spolia_core.reuse import DEFAULT_MIN_REUSED_TOKENS
from spolia_engine.adapter import ModelAdapter
from spolia_engine.core import EngineCore
from spolia_engine.engine import Engine
from spolia_engine.grammar import Grammars
from spolia_engine.text import load_decode
from spolia_node.logs import get_log
from spolia_worker.config import WorkerConfig

log = get_log(__name__)


def load_engine(config: WorkerConfig) -> Engine:
    """The engine the settings and the model's profile ask for.

    Raises `SpoliaError`, naming what is wrong with the settings, the model's files or the profile. Sets torch's number
    of threads, which is the process's.
    """
    if not config.model:
        raise InvalidRequest("model is not set: give the directory of a model", field="model")
    _check_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    transformers_logging.disable_progress_bar()  # stderr is for log lines
    adapter = ModelAdapter.load(
        config.model,
        dtype=config.dtype,
        max_context_tokens=config.max_context_tokens or None,
        device=config.device,
    )
    profile = find_profile(Path(config.model), config.profile_dir, adapter.fingerprint.hex())
    return Engine.of(
        adapter,
        load_decode(config.model),
        pool_bytes=config.pool_bytes,
        block_size=config.block_size or None,
        num_sink_tokens=LinkTerms.of(profile).policy.num_sink_tokens,
        grammars=Grammars.of(config.model, adapter.vocab_size, adapter.eos_token_ids),
    )


def load_terms(
    config: WorkerConfig,
    core: EngineCore,
    num_link_tokens: int | None = None,
    min_reused_tokens: int = DEFAULT_MIN_REUSED_TOKENS,
) -> LinkTerms:
    """On what terms a node with this engine serves LINKED; `num_link_tokens`: set by hand by its operator, if anything.

    With `min_reused_tokens` below what profiles are calibrated with, more is reused than was measured: the terms are
    "manual" then, and a refusal stands, since what it forbade loses no less.

    Raises as `find_profile` does, and `InvalidRequest` for a profile of another recipe than the engine's: it was
    changed while the node started.
    """
    profile = find_profile(Path(config.model), config.profile_dir, core.adapter.fingerprint.hex())
    terms = LinkTerms.of(profile, num_link_tokens)
    sinks = core.recipe.num_sink_tokens
    if terms.policy.num_sink_tokens != sinks:
        raise InvalidRequest(
            f"profile {profile.name if profile else terms.profile} compiles chunks behind "
            f"{terms.policy.num_sink_tokens} sink tokens, the engine was made for {sinks}: start the node again",
            field="profile",
            limit=f"{sinks} sink tokens",
            actual=f"{terms.policy.num_sink_tokens} sink tokens",
        )
    if min_reused_tokens < DEFAULT_MIN_REUSED_TOKENS:
        log.warning(
            "shorter documents are reused than profiles are calibrated with",
            profile=terms.profile,
            min_reused_tokens=min_reused_tokens,
            calibrated_with=DEFAULT_MIN_REUSED_TOKENS,
        )
        terms = replace(terms, profile=MANUAL_PROFILE)
    log.info("linked terms", profile=terms.profile, policy=terms.policy.name, refusal=terms.refusal)
    if profile is not None and not profile.allows_linked and not terms.refusal:
        log.warning("link tokens set by hand override a profile that forbids LINKED", profile=profile.name)
    return terms


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise InvalidRequest(f"device {name} cannot be used: {reason}", field="device", actual=name) from error
