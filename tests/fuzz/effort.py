"""How long to fuzz: a fixed, short run, the same every time; or for SPOLIA_FUZZ_SECONDS, other inputs each time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

SECONDS_ENV = "SPOLIA_FUZZ_SECONDS"
SEED_ENV = "SPOLIA_FUZZ_SEED"
BATCH = 50

SECONDS = float(os.environ.get(SECONDS_ENV, "0"))
FIRST_SEED = int(os.environ.get(SEED_ENV, "0"))


def fuzz(body: Callable[..., None], share: float, num_short: int, **strategies: Any) -> None:
    """Calls `body` with what the strategies draw: `num_short` times, or for `share` of the seconds asked for.

    A failure names the seed of its batch; with SPOLIA_FUZZ_SEED set to it the batch comes first.
    """
    until, number = time.monotonic() + SECONDS * share, FIRST_SEED
    while True:
        _batch(body, number, BATCH if SECONDS else num_short, strategies)
        number += 1
        if time.monotonic() >= until:
            return


def _batch(body: Callable[..., None], number: int, num_examples: int, strategies: dict[str, Any]) -> None:
    chosen = settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    try:
        chosen(seed(number)(given(**strategies)(body)))()
    except BaseException as error:
        error.add_note(f"{SEED_ENV}={number}")
        raise
