"""Decode steps with and without constraints, by turns, and their parts."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spolia_bench.structured.vocabulary import write_tokenizer
from spolia_core.constraint import Constraint
from spolia_core.sampling import SamplingParams
from spolia_engine.adapter import ModelAdapter
from spolia_engine.engine import Engine
from spolia_engine.grammar import Grammars
from spolia_engine.next_tokens import accept_row
from spolia_engine.sequence import Sequence, close_all
from spolia_engine.sequence_starts import start_samples
from spolia_engine.text import load_decode

PROMPT_TOKENS = 128
MAX_TOKENS = 1000
_ITEM = {
    "type": "object",
    "properties": {"id": {"type": "integer"}, "price": {"type": "number"}, "sold": {"type": "boolean"}},
    "required": ["id", "price", "sold"],
    "additionalProperties": False,
}
CONSTRAINTS = {
    "none": None,
    "a string in JSON": Constraint.json_schema({"type": "string", "minLength": 30_000}),
    "objects of numbers": Constraint.json_schema({"type": "array", "items": _ITEM, "minItems": 2000}),
    "any JSON object": Constraint.json_schema({"type": "array", "items": {"type": "object"}, "minItems": 2000}),
    "regex, letters": Constraint.regex("[a-z ]{30000,}"),
}
"""None of them lets an answer end within a run."""


@dataclass(frozen=True, slots=True)
class Size:
    """Layers and width of a Llama shape."""

    layers: int
    width: int
    mlp: int


@dataclass(slots=True)
class Times:
    """Of one constraint, in milliseconds: whole steps, their drawing for a row, the mask alone for a row."""

    steps: list[float] = field(default_factory=list)
    draws: list[float] = field(default_factory=list)
    masks: list[float] = field(default_factory=list)

    @property
    def step_ms(self) -> float:
        """A step, drawing included."""
        return statistics.median(self.steps)


@contextmanager
def engine(size: Size, num_tokens: int, seed: int) -> Iterator[Engine]:
    """Random weights over a vocabulary of `num_tokens` and an end."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=num_tokens + 1,
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=num_tokens,
    )
    with tempfile.TemporaryDirectory(prefix="spolia-bench-") as folder:
        write_tokenizer(Path(folder), num_tokens, seed)
        adapter = ModelAdapter(LlamaForCausalLM(config).eval())
        grammars = Grammars.of(folder, adapter.vocab_size, adapter.eos_token_ids)
        yield Engine.of(adapter, load_decode(folder), pool_bytes=1 << 29, grammars=grammars)


def measure(core: Engine, num_rows: int, num_steps: int, temperature: float) -> dict[str, Times]:
    """Times of every constraint; each takes a step in every round. The first rounds warm up.

    Masks are timed in rounds of their own: asking for one makes the next asking cheaper.
    """
    batches = {name: _batch(core, each, num_rows, temperature) for name, each in CONSTRAINTS.items()}
    times = {name: Times() for name in CONSTRAINTS}
    for round_ in range(-4, 2 * num_steps):
        for name, batch in batches.items():
            into = times[name] if round_ >= 0 else Times()
            if round_ % 2:
                into.masks.append(_mask_ms(batch))
                _step(core, batch, Times())
            else:
                _step(core, batch, into)
    for batch in batches.values():
        close_all(batch)
    core.decoding.forget_plan()
    return times


def compile_ms(core: Engine, constraint: Constraint) -> float:
    """A constraint that was never seen; the vocabulary was."""
    core.compile_constraint(SamplingParams(constraint=Constraint.regex("a")))
    started = time.perf_counter()
    core.compile_constraint(SamplingParams(constraint=constraint))
    return 1e3 * (time.perf_counter() - started)


def _batch(core: Engine, constraint: Constraint | None, num_rows: int, temperature: float) -> list[Sequence]:
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=MAX_TOKENS, constraint=constraint)
    grammar = core.compile_constraint(params)
    context = core.exact_context([*range(PROMPT_TOKENS)], [])
    sequences = start_samples(context, [core.generation(params, index, grammar) for index in range(num_rows)])
    first = core.decoding.logits_after([sequences[0].context])[0]
    for sequence in sequences:
        accept_row(sequence.generation, first)
    return sequences


def _mask_ms(batch: list[Sequence]) -> float:
    """For a row, the ids of what it allows included."""
    started = time.perf_counter()
    for sequence in batch:
        if sequence.generation.matcher is not None:
            sequence.generation.matcher.allowed()
    return 1e3 * (time.perf_counter() - started) / len(batch)


def _step(core: Engine, batch: list[Sequence], times: Times) -> None:
    core.decoding.forget_plan()
    started = time.perf_counter()
    logits = core.decoding.step_logits(batch)
    computed = time.perf_counter()
    for sequence, row in zip(batch, logits, strict=True):
        accept_row(sequence.generation, row)
    ended = time.perf_counter()
    if any(sequence.finished for sequence in batch):
        raise RuntimeError("an answer ended within the run: its steps are not those that were to be measured")
    times.steps.append(1e3 * (ended - started))
    times.draws.append(1e3 * (ended - computed) / len(batch))
