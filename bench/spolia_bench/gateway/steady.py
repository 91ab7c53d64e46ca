"""A steady crowd: as many streams as there are, each of which asks again as soon as it has been answered."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from spolia_bench.gateway.questions import Asked
from spolia_bench.gateway.timing import StreamTime, WrongAnswer

Ask = Callable[[Asked], Awaitable[StreamTime]]


async def steadily(ask: Ask, asked: Sequence[Asked], num_streams: int, spread_s: float) -> list[StreamTime]:
    """Has `num_streams` at once until nothing of `asked` is left, and returns the answers that had full company from
    their first moment to their last.

    Streams begin one after the other within `spread_s`; of about one answer's length it leaves each of them at another
    point of its answer, as among users who know nothing of one another. Where an answer turns out to be shorter, the
    rest begin when the first has ended. Raises `WrongAnswer` where no answer counts: too few questions.
    """
    left, answers = deque(asked), list[StreamTime]()
    full_s, over_s = 0.0, float("inf")
    has_answered = asyncio.Event()

    async def stream(index: int) -> None:
        nonlocal full_s, over_s
        with suppress(TimeoutError):
            async with asyncio.timeout(index * spread_s / num_streams):
                await has_answered.wait()
        full_s = max(full_s, time.perf_counter())
        while left:
            one = left.popleft()
            took = await ask(one)
            took.check(one.num_tokens)
            answers.append(took)
            has_answered.set()
        over_s = min(over_s, time.perf_counter())

    async with asyncio.TaskGroup() as streams:
        for index in range(num_streams):
            streams.create_task(stream(index))
    counted = [took for took in answers if full_s <= took.sent_s and took.end_s <= over_s]
    if not counted:
        raise WrongAnswer(f"of {len(answers)} answers none had {num_streams - 1} others beside it all the time")
    return counted
