"""Prompts of documents and live tokens, and answers checked against transformers."""

from __future__ import annotations

from typing import Any

from engine_worlds import (
    assert_nothing_held,
    check_greedy,
    oracle_greedy,
    oracle_of,
    tokens,
)

from spolia_core.prompt import Part, Prompt
from spolia_core.sampling import SamplingParams
from spolia_engine.engine import Engine


def greedy(count: int, **changes: Any) -> SamplingParams:
    return SamplingParams(max_tokens=count, **changes)


def live(count: int, seed: int) -> Part:
    return Part(tuple(tokens(count, seed)))


def check_answer(engine: Engine, ids: list[int], count: int, name: str = "llama") -> list[int]:
    """An EXACT answer against transformers; returns its ids."""
    expected, margins = oracle_greedy(oracle_of(name), ids, count)
    answer = engine.generate(Prompt.live(ids), greedy(count))
    assert check_greedy(answer.token_ids, expected, margins) >= min(count, 8)
    assert_nothing_held(engine)
    return list(answer.token_ids)


def documents(engine: Engine) -> Prompt:
    a, b = engine.chunk(tokens(150, 1)), engine.chunk(tokens(10, 2))
    return Prompt((live(3, 3), a, b, live(4, 4), a, live(5, 5)))
