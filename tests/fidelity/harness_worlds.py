"""Tiny models and cases for the harness: random weights, sharp enough that reuse shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spolia_bench.models import LLAMA_TINY, random_model
from spolia_engine.adapter import ModelAdapter
from spolia_fidelity.case import Case, Question
from spolia_fidelity.encoder import TextEncoder
from spolia_fidelity.policy import parse_policies
from spolia_fidelity.runner import PolicyRun, Runner

DEMO = Path(__file__).parents[2] / "models" / "demo"
BOS = 256
CHUNK_TOKENS = 24
TIMES = ("seconds",)
"""Fields of a result that differ between two runs."""


def sharp_model(folder: Path) -> Path:
    """A directory with a random two-layer Llama, one token per byte, whose predictions depend on its context."""
    path = random_model(LLAMA_TINY, 0, cache=folder)
    weights = load_file(path / "model.safetensors")
    save_file(
        {name: tensor * (6.0 if tensor.ndim == 2 else 1.0) for name, tensor in weights.items()},
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    return path


def tokens(count: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 256, (count,), generator=generator).tolist())


def case_of(seed: int = 0, *, num_chunks: int = 4, preamble: Sequence[int] = (BOS,), num_questions: int = 3) -> Case:
    """Chunks and questions of random bytes; the answers are nobody's first choice."""
    chunks = tuple(tokens(CHUNK_TOKENS + index, 100 * seed + index) for index in range(num_chunks))
    questions = tuple(
        Question("bytes", tokens(5 + index, 100 * seed + 50 + index), tokens(4, 100 * seed + 70 + index), exact=True)
        for index in range(num_questions)
    )
    return Case(f"case-{seed}", tuple(preamble), chunks, questions)


def with_questions(case: Case, *questions: Question) -> Case:
    return replace(case, questions=questions)


def run(adapter: ModelAdapter, encoder: TextEncoder, policies: str, cases: Sequence[Case]) -> dict[str, PolicyRun]:
    """Every policy on every case, with nothing left held in any engine."""
    runner = Runner(adapter, encoder.decode, parse_policies(policies))
    runs = runner.run(cases)
    for engine in runner.engines.values():
        engine.pool.check_invariants()
        counts = {state.value: count for state, count in engine.pool.counts().items()}
        assert counts["referenced"] == counts["in_transfer"] == 0, counts
    return runs


def one_json(captured: pytest.CaptureFixture[str]) -> Any:
    """The one line on standard output."""
    out = captured.readouterr().out
    assert out.count("\n") == 1, out
    return json.loads(out)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(item) for name, item in value.items() if name not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value
