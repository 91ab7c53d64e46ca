"""What the end-to-end tests share: the oracle in this process, prompts, and ways to wait."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from spolia import Client, Result, TokenIds
from spolia_core.prompt import Prompt
from spolia_core.sampling import SamplingParams
from spolia_engine.engine import Completion, Engine

DEMO_MODEL = Path(os.environ.get("SPOLIA_TEST_MODEL") or Path(__file__).parents[2] / "models" / "demo")
MARGIN = 1e-3
"""Where the oracle's two best logits lie closer, rounding may choose either, and a comparison ends."""

SENTENCES = (
    "The lighthouse stood at the end of the long pier. ",
    "Every morning the baker opened her shop before the sun rose. ",
    "A small boat came over the water with three men and a dog. ",
    "Nobody in the village remembered who had built the old bridge. ",
    "He counted the coins twice and put them back into the box. ",
    "In winter the road was closed, and the letters came late. ",
)


class Oracle:
    """`Engine.generate` with nothing cached: what every answer is compared with."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self.engine = Engine.load(model)

    def answer(self, token_ids: Sequence[int], max_tokens: int) -> Completion:
        """The greedy answer, computed from scratch."""
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        fresh = Engine.of(self.engine.adapter, self.engine._decode)
        return fresh.generate(Prompt.live(token_ids), params)


def num_equal(oracle: Completion, token_ids: Sequence[int]) -> int:
    """How many tokens were compared and equal before the oracle met a near tie; asserts that no other differs."""
    for index, (expected, got) in enumerate(zip(oracle.token_ids, token_ids, strict=True)):
        if expected != got:
            assert oracle.margins[index] < MARGIN, f"token {index}: {got}, oracle {expected}"
            return index
    return len(oracle.token_ids)


def prompts(count: int, seed: int) -> list[str]:
    """Texts of one to some forty sentences, none a prefix of another."""
    rng = random.Random(seed)
    return [f"Story {seed}.{i}: " + "".join(rng.choices(SENTENCES, k=1 + 2 * i)) for i in range(count)]


def ask_exact(client: Client, token_ids: Sequence[int], max_tokens: int) -> Result:
    """Greedy, EXACT, on token ids, begin-of-sequence token included by the gateway."""
    return client.generate([TokenIds(tuple(token_ids))], max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def wait_until(what: str, holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Returns once `holds`; fails, naming `what`, when it does not in time. Other processes offer nothing to await."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


def ledgers_are_empty(client: Client) -> bool:
    """No node holds a block, runs or queues anything."""
    nodes = client.cluster().nodes
    return all(
        n.referenced_blocks + n.in_transfer_blocks + n.lent_blocks + n.num_waiting + n.queued_tokens == 0
        and (n.num_running == 0 or n.role == "gateway")
        for n in nodes
    )
