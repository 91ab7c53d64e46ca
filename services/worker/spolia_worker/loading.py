"""Loads the engine a node serves."""

from __future__ import annotations

import torch
from transformers.utils import logging as transformers_logging

from spolia_core.errors import InvalidRequest
from spolia_engine.engine import Engine
from spolia_worker.config import WorkerConfig


def load_engine(config: WorkerConfig) -> Engine:
    """The engine the settings ask for. Raises `SpoliaError`, naming what is wrong with them or with the model's files.

    Sets torch's number of threads, which is the process's.
    """
    if not config.model:
        raise InvalidRequest("model is not set: give the directory of a model", field="model")
    _check_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    transformers_logging.disable_progress_bar()  # stderr is for log lines
    return Engine.load(
        config.model,
        dtype=config.dtype,
        max_context_tokens=config.max_context_tokens or None,
        pool_bytes=config.pool_bytes,
        block_size=config.block_size,
        device=config.device,
    )


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise InvalidRequest(f"device {name} cannot be used: {reason}", field="device", actual=name) from error
