"""Tiny models and engines for tests: random weights, large enough that logits differ, small enough to run anywhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from spolia_core.reuse import PREFIX_CHUNK_TOKENS
from spolia_engine.adapter import ModelAdapter
from spolia_engine.core import EngineCore
from spolia_engine.device_decoding import DeviceSettings
from spolia_engine.engine import Engine
from spolia_engine.extent import BlockState
from spolia_engine.next_tokens import accept_row
from spolia_engine.sequence import Sequence as DecodeSequence

VOCAB_SIZE = 97
BOS = 5
"""Begin-of-sequence token of the models whose names end in "-bos"; the others have none."""
MAX_CONTEXT = 4608
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": MAX_CONTEXT,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR = {**PLAIN, "rope_type": "linear", "factor": 2.5}
LLAMA3 = {
    **PLAIN,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 576,
}
YARN = {**PLAIN, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1152}
DYNAMIC = {**PLAIN, "rope_type": "dynamic", "factor": 2.0}


def longrope(head_dim: int) -> dict[str, Any]:
    """Factors for each pair of numbers of a head."""
    return {
        **PLAIN,
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.05 * i for i in range(head_dim // 2)],
        "long_factor": [1.0 + 0.5 * i for i in range(head_dim // 2)],
        "original_max_position_embeddings": 256,
        "factor": 18.0,
    }


LONGROPE = longrope(int(SIZES["head_dim"]))

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K" / "hf"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"the real model is not at {STORIES}")


@dataclass
class Place:
    """Where engines of these worlds keep KV and decode: in extents on the CPU, or in the slots of a device."""

    name: str = "cpu"

    @property
    def head_dim(self) -> int:
        """Numbers of a head: the least that a device's kernels have, elsewhere fewer."""
        return int(SIZES["head_dim"]) if self.name == "cpu" else 64

    @property
    def settings(self) -> DeviceSettings | None:
        """How a device decodes."""
        return None if self.name == "cpu" else DeviceSettings(row_buckets=(1, 2, 4, 8), min_parts=64)

    @property
    def device(self) -> str:
        """Torch's name of it."""
        return "cuda" if self.name == "cuda" else "cpu"


PLACE = Place()
"""Set by the fixture `place`, for the tests that run in more places than one."""
PLACES = [
    "cpu",
    *(["slots"] if os.environ.get("SPOLIA_TEST_SLOTS") else []),
    *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []),
]
"""The CPU; its memory in slots, by the references of a device's kernels, where that is asked for; a device."""
only_in_extents = pytest.mark.parametrize("place", ["cpu"], indirect=True)
"""Of tests that look into how a CPU decodes, or count its blocks: a tail takes them as it grows."""


def llama_config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**SIZES, "rope_parameters": dict(PLAIN), **changes})


def model_of(name: str) -> Any:
    """A random model by name, on the CPU. Shared by tests of one process; nobody changes it."""
    return _model(name, PLACE.head_dim)


@cache
def _model(name: str, head_dim: int) -> Any:
    torch.manual_seed(sum(name.encode()))
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(SIZES, "head_dim", head_dim)
        model = _BUILDERS[name]()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif parameter.ndim == 1:  # norms start as all ones, which would hide one that is left out
                parameter.uniform_(0.6, 1.4)
    return model.eval()


_BUILDERS = {
    "llama": lambda: LlamaForCausalLM(llama_config()),
    "llama-mha": lambda: LlamaForCausalLM(llama_config(num_key_value_heads=6)),
    "llama-mqa": lambda: LlamaForCausalLM(llama_config(num_key_value_heads=1)),
    "llama-tied": lambda: LlamaForCausalLM(llama_config(tie_word_embeddings=True, attention_bias=True)),
    "llama-linear": lambda: LlamaForCausalLM(llama_config(rope_parameters=dict(LINEAR))),
    "llama-llama3": lambda: LlamaForCausalLM(llama_config(rope_parameters=dict(LLAMA3))),
    "llama-yarn": lambda: LlamaForCausalLM(llama_config(rope_parameters=dict(YARN))),
    "llama-dynamic": lambda: LlamaForCausalLM(llama_config(rope_parameters=dict(DYNAMIC), max_position_embeddings=256)),
    "llama-longrope": lambda: LlamaForCausalLM(llama_config(rope_parameters=longrope(SIZES["head_dim"]))),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, rope_parameters=dict(PLAIN))),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, rope_parameters=dict(PLAIN))),
    "llama-bos": lambda: LlamaForCausalLM(llama_config(bos_token_id=BOS)),
    "llama-yarn-bos": lambda: LlamaForCausalLM(llama_config(bos_token_id=BOS, rope_parameters=dict(YARN))),
    "llama-one-layer": lambda: LlamaForCausalLM(llama_config(num_hidden_layers=1)),
    "llama-deep": lambda: LlamaForCausalLM(llama_config(num_hidden_layers=4)),
    "qwen3-bos": lambda: Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "bos_token_id": BOS}, rope_parameters=dict(PLAIN))),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, rope_parameters=dict(PLAIN), sliding_window=None)),
}


def oracle_of(name: str) -> Any:
    """The same weights as `model_of`, run by transformers alone: the adapter never sees this copy."""
    return _oracle(name, PLACE.head_dim)


@cache
def _oracle(name: str, head_dim: int) -> Any:
    model = _model(name, head_dim)
    config = type(model.config).from_dict(model.config.to_dict())
    config._attn_implementation = "eager"
    oracle = type(model)(config)
    oracle.load_state_dict(model.state_dict())
    return oracle.eval()


def adapter_of(name: str) -> ModelAdapter:
    return _adapter(name, PLACE.head_dim, PLACE.device)


@cache
def _adapter(name: str, head_dim: int, device: str) -> ModelAdapter:
    model = _model(name, head_dim)
    return ModelAdapter(model if device == "cpu" else deepcopy(model).to(device))


def letters(token_ids: Sequence[int]) -> str:
    """A decoder for tests: one character for each id."""
    return "".join(chr(0x4E00 + token_id) for token_id in token_ids)


def engine_of(name: str = "llama", *, num_blocks: int = 4096, block_size: int = 16, num_sink_tokens: int = 0) -> Engine:
    return Engine(
        adapter_of(name),
        letters,
        num_blocks=num_blocks,
        block_size=block_size,
        num_sink_tokens=num_sink_tokens,
        device=PLACE.settings,
    )


def tokens(count: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """`count` random token ids; the first is never that of another seed's by accident of a common start."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, vocab_size, (count,), generator=generator).tolist()


@torch.no_grad()
def oracle_logits(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    """Logits [num_tokens, vocab_size] of transformers' own forward."""
    logits: torch.Tensor = model(torch.tensor([list(token_ids)]), use_cache=False).logits
    return logits[0].float()


@torch.no_grad()
def oracle_greedy(model: Any, token_ids: Sequence[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy continuation by transformers' forward over its own cache, and the margin of each choice."""
    ids, margins, cache_, fresh = [], [], None, list(token_ids)
    for _ in range(count):
        output = model(torch.tensor([fresh]), past_key_values=cache_, use_cache=True)
        cache_ = output.past_key_values
        best = torch.topk(output.logits[0, -1].float(), 2)
        ids.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        fresh = ids[-1:]
    return ids, margins


MARGIN = 1e-3


def check_greedy(got: Sequence[int], expected: Sequence[int], margins: Sequence[float]) -> int:
    """Asserts that answers agree up to the first close call of the oracle; returns how many ids were compared."""
    for index, (mine, its, margin) in enumerate(zip(got, expected, margins, strict=True)):
        if margin < MARGIN:
            return index
        assert mine == its, f"token {index} is {mine}, the oracle's {its} with a margin of {margin}"
    return len(expected)


def step(core: EngineCore, sequence: DecodeSequence) -> None:
    """One decode step of one sequence."""
    accept_row(sequence.generation, core.decoding.step_logits([sequence])[0])


def rows_together(core: EngineCore) -> int:
    """The most rows for which the batch that was stepped last reads some keys at once: 1 where nothing is shared."""
    if core.decoding.device is None:
        planned = core.decoding._steps._plan
        assert planned is not None
        return max((len(group.rows) for group in planned.plan.groups if group.shared), default=1)
    step = core.decoding.device._step
    assert step is not None
    readings = step._work.items[: int(step._work.num_items), 2]  # of each item: a tile's readings of the same keys
    return int(readings.max()) if len(readings) else 1


def assert_nothing_held(core: EngineCore) -> None:
    """The ledger after a request: nothing referenced, nothing on its way, everything adds up."""
    core.pool.check_invariants()
    counts = core.pool.counts()
    assert counts[BlockState.REFERENCED] == counts[BlockState.IN_TRANSFER] == counts[BlockState.LENT] == 0, counts
    assert counts[BlockState.FREE] + counts[BlockState.CACHED] == core.pool.num_blocks


def full_blocks(num_tokens: int) -> int:
    """Tokens in full prefix chunks."""
    return num_tokens // PREFIX_CHUNK_TOKENS * PREFIX_CHUNK_TOKENS
