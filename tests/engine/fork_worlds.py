"""Contexts to fork, tails behind them, and how near logits must be."""

from __future__ import annotations

from collections.abc import Sequence

from engine_worlds import (
    assert_nothing_held,
    tokens,
)
from torch import Tensor

from spolia_core.prompt import Part, Prompt
from spolia_engine.context import Context
from spolia_engine.engine import Engine
from spolia_engine.fork import Forks
from spolia_engine.link_plan import LinkPlan, plan_link

NEAR = 1e-5  # relative to the scale of the logits
LENS = (5, 1, 17, 40, 17, 2, 64, 3)


def tails_of(lens: Sequence[int] = LENS) -> list[list[int]]:
    return [tokens(length, 50 + index) for index, length in enumerate(lens)]


def exact(engine: Engine, count: int = 70) -> tuple[list[int], Context]:
    ids = tokens(count)
    return ids, engine.exact_context(ids, [])


def linked(engine: Engine, k: int = 4, *, last_is_chunk: bool = False) -> tuple[Prompt, LinkPlan, Context]:
    """A context with chunks at several offsets, one of them twice, two side by side."""
    a, b = engine.chunk(tokens(60, 1)), engine.chunk(tokens(33, 2))
    parts = (Part((7, 8)), a, b, Part(tuple(tokens(9, 3))), a, *(() if last_is_chunk else (Part((9,)),)))
    prompt = Prompt(parts)
    plan = plan_link(prompt, k)
    runs = {}
    for index in dict.fromkeys(f.part_index for f in plan.fragments):
        part = parts[index]
        assert part.chunk_id is not None
        runs[index] = engine.resident.acquire(part.chunk_id) or engine.compile(part.chunk_id, part.token_ids)
    return prompt, plan, engine.linked_context(prompt, runs, plan)


def logits_of(engine: Engine, forks: Forks) -> list[Tensor]:
    return [engine.adapter.logits(hidden) for hidden in forks.hidden]


def assert_near(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    error = float((got.cpu() - expected.cpu()).abs().max() / expected.abs().max())
    assert error <= NEAR, f"relative error {error:.2e}"


def close_all(engine: Engine, context: Context, forks: Forks) -> None:
    forks.close()
    forks.close()
    context.close()
    assert_nothing_held(engine)
