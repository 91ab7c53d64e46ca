"""Both laws of linking over random prompts: chunks and live text of any length, in any order, repeated, for any k."""

from __future__ import annotations

import random

import pytest
from engine_worlds import engine_of, oracle_of, tokens
from link_oracle import dense_forward
from link_worlds import LAW_2, check_law_1, link_here, live, relative_error

from spolia_core.prompt import Part, Prompt
from spolia_engine.engine import Engine
from spolia_engine.link_plan import plan_link

pytestmark = pytest.mark.usefixtures("place")

NUM_COMPOSITIONS = 200
GROUPS = 20
PLAIN = ("llama", "llama-yarn", "qwen2", "qwen3")
WITH_BOS = ("llama-bos", "llama-yarn-bos", "qwen3-bos")
SINKS = (0, 1, 4, 33)
MAX_CHUNK = 90


def composition(rng: random.Random, engine: Engine) -> Prompt:
    """One to seven parts, chunks more often than not; a few distinct chunks, so that some are repeated."""
    lengths = [rng.choice([1, 2, rng.randint(1, 20), rng.randint(1, MAX_CHUNK)]) for _ in range(rng.randint(1, 3))]

    def part() -> Part:
        if rng.random() < 0.35:
            return live(rng.choice([1, rng.randint(1, 40)]), rng.randint(0, 99))
        seed = rng.randrange(len(lengths))
        return engine.chunk(tokens(lengths[seed], seed))

    return Prompt(tuple(part() for _ in range(rng.randint(1, 7))))


def longest_chunk(prompt: Prompt) -> int:
    return max((len(part.token_ids) for part in prompt.parts if part.chunk_id is not None), default=0)


@pytest.mark.parametrize("group", range(GROUPS))
def test_both_laws_hold_for_random_compositions(group: int) -> None:
    rng = random.Random(group)
    name = rng.choice(PLAIN) if group % 2 else rng.choice(WITH_BOS)
    num_sink_tokens = 0 if group % 2 else SINKS[group // 2 % len(SINKS)]
    engine = engine_of(name, num_sink_tokens=num_sink_tokens)
    for _ in range(NUM_COMPOSITIONS // GROUPS):
        prompt = composition(rng, engine)
        longest = longest_chunk(prompt)
        k = rng.choice([0, 1, max(0, longest - 1), rng.randint(0, MAX_CHUNK)])
        check_law_1(engine, name, prompt, plan_link(prompt, k, num_sink_tokens=num_sink_tokens))
        # A chunk at position 0 is reused whole for any k where that is exact, so the second law holds there, too.
        whole = plan_link(prompt, longest + rng.choice([0, 1, 1000]), num_sink_tokens=num_sink_tokens)
        assert {fragment.offset for fragment in whole.fragments} <= ({0} if num_sink_tokens == 0 else set())
        recomputed = dense_forward(oracle_of(name), prompt.token_ids)[-1]
        assert relative_error(link_here(engine, prompt, whole)[:1], [recomputed]) <= LAW_2
