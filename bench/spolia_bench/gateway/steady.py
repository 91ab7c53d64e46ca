"""A steady crowd: as many streams as there are, each of which asks again as soon as it has been answered."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from spolia_bench.gateway.questions import Asked
from spolia_bench.gateway.timing import StreamTime, WrongAnswer

Ask = Callable[[Asked], Awaitable[StreamTime]]


async def steadily(ask: Ask, asked: Sequence[Asked], num_streams: int, spread_s: float) -> list[StreamTime]:
    """Has `num_streams` at once until nothing of `asked` is left, and returns the answers that had full company from
    their first moment to their last.

    Streams begin one after the other within `spread_s`; of about one answer's length it leaves each of them at another
    point of its answer, as among users who know nothing of one another. Raises `WrongAnswer` where no answer counts:
    too few questions, or a `spread_s` too long for them.
    """
    left, answers = deque(asked), list[StreamTime]()
    full_s, over_s = 0.0, float("inf")

    async def stream(index: int) -> None:
        nonlocal full_s, over_s
        await asyncio.sleep(index * spread_s / num_streams)
        full_s = max(full_s, time.perf_counter())
        while left:
            one = left.popleft()
            took = await ask(one)
            took.check(one.num_tokens)
            answers.append(took)
        over_s = min(over_s, time.perf_counter())

    async with asyncio.TaskGroup() as streams:
        for index in range(num_streams):
            streams.create_task(stream(index))
    counted = [took for took in answers if full_s <= took.sent_s and took.end_s <= over_s]
    if not counted:
        raise WrongAnswer(f"of {len(answers)} answers none had {num_streams - 1} others beside it all the time")
    return counted
