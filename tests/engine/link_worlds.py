"""Linking here and by the model itself, and how far the two may differ."""

from __future__ import annotations

import torch
from engine_worlds import BOS, assert_nothing_held, oracle_of, tokens
from link_oracle import link, next_logits

from spolia_core.prompt import Part, Prompt
from spolia_core.sampling import SamplingParams
from spolia_engine.engine import Engine
from spolia_engine.link_plan import LinkPlan
from spolia_engine.sequence_starts import start_sequence

LAW_1 = 1e-5  # relative to the scale of the logits
LAW_2 = 3e-5
DECODE_STEPS = 2


def live(count: int, seed: int) -> Part:
    return Part(tuple(tokens(count, seed)))


def link_here(engine: Engine, prompt: Prompt, plan: LinkPlan) -> list[torch.Tensor]:
    """Logits behind the prompt, and of a few decode steps over a dictated answer."""
    runs = {}
    for index in dict.fromkeys(f.part_index for f in plan.fragments):
        part = prompt.parts[index]
        assert part.chunk_id is not None
        runs[index] = engine.resident.acquire(part.chunk_id) or engine.compile(part.chunk_id, part.token_ids)
    context = engine.linked_context(prompt, runs, plan)
    context.check_invariants()
    assert context.num_tokens == prompt.num_tokens
    assert context.num_computed_tokens == len(plan.positions)
    assert context.last_hidden is not None
    found = [engine.adapter.logits(context.last_hidden[None])[0]]
    sequence = start_sequence(context, engine.generation(SamplingParams(max_tokens=DECODE_STEPS + 1)))
    for token in tokens(DECODE_STEPS, seed=77):
        sequence.generation.accept(token)
        found.append(engine.decoding.step_logits([sequence])[0])
    engine.decoding.forget_plan()
    sequence.close()
    assert_nothing_held(engine)
    return found


def link_there(name: str, prompt: Prompt, plan: LinkPlan, num_sink_tokens: int = 0) -> list[torch.Tensor]:
    model = oracle_of(name)
    linked = link(model, prompt, plan.positions, sinks=[BOS] * num_sink_tokens)
    found = [linked.logits[-1]]
    for index, token in enumerate(tokens(DECODE_STEPS, seed=77)):
        found.append(next_logits(model, linked, prompt.num_tokens + index, token))
    return found


def relative_error(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    pairs = zip(got, expected, strict=True)
    return max(float((mine.cpu() - its.cpu()).abs().max() / its.abs().max()) for mine, its in pairs)


def check_law_1(engine: Engine, name: str, prompt: Prompt, plan: LinkPlan) -> None:
    there = link_there(name, prompt, plan, engine.recipe.num_sink_tokens)
    error = relative_error(link_here(engine, prompt, plan), there)
    assert error <= LAW_1, f"relative error {error:.2e}"
