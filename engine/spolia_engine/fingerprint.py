"""Fingerprint of a model: what decides the numbers in its KV."""

from __future__ import annotations

import json
from typing import Any

import blake3
import torch
from torch import Tensor

# Settings that say how a model is stored or run, not what it computes.
NEUTRAL_CONFIG_KEYS = frozenset(
    {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}
)


def fingerprint_model(model: Any, inv_freq: Tensor, rope_scaling: float) -> bytes:
    """BLAKE3, 32 bytes, over config, RoPE frequencies and every weight as loaded (compute dtype included).

    Reading the weights costs their bytes over memory bandwidth: about a second for 10 GB.
    """
    hasher = blake3.blake3(max_threads=blake3.blake3.AUTO)
    config = {k: v for k, v in model.config.to_dict().items() if k not in NEUTRAL_CONFIG_KEYS}
    hasher.update(json.dumps(config, sort_keys=True, default=str).encode())
    hasher.update(_bytes(inv_freq) + repr(rope_scaling).encode())
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        hasher.update(_bytes(tensor))
    return hasher.digest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes()
