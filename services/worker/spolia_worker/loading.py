"""Loads the engine a node serves."""

from __future__ import annotations

import torch

from spolia_core.errors import InvalidRequest
from spolia_engine.engine import Engine
from spolia_worker.config import WorkerConfig


def load_engine(config: WorkerConfig) -> Engine:
    """The engine the settings ask for. Raises `InvalidRequest`, `NotFound` or `NotSupported`, naming what is wrong."""
    if not config.model:
        raise InvalidRequest("model is not set: give the directory of a model", field="model")
    if config.threads:
        torch.set_num_threads(config.threads)
    return Engine.load(
        config.model,
        dtype=config.dtype,
        max_context_tokens=config.max_context_tokens or None,
        pool_bytes=config.pool_bytes,
        block_size=config.block_size,
        device=config.device,
    )
