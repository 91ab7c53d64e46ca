"""Answers to several prompts at once, as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from spolia.v1 import gateway_pb2
from spolia_gateway.http.gathered import Responses

QUEUED_PER_PROMPT = 4
"""Events that may wait for a slow reader, of each prompt."""

Numbered = tuple[int, gateway_pb2.GenerateResponse]
_Queue = asyncio.Queue[Numbered | Exception | None]


async def together(answers: Sequence[Responses]) -> AsyncGenerator[Numbered, None]:
    """Every event with the index of its prompt, in the order they come. The first error ends all of them.

    Closing it closes every answer.
    """
    if len(answers) == 1:
        async with aclosing(answers[0]) as only:
            async for response in only:
                yield 0, response
        return
    queue = _Queue(QUEUED_PER_PROMPT * len(answers))
    tasks = [asyncio.ensure_future(_pump(index, answer, queue)) for index, answer in enumerate(answers)]
    left = len(tasks)
    try:
        while left:
            event = await queue.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                left -= 1
            else:
                yield event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(index: int, answer: Responses, queue: _Queue) -> None:
    """Passes an answer on; then None, or the error that ended it."""
    try:
        async with aclosing(answer) as responses:
            async for response in responses:
                await queue.put((index, response))
    except Exception as error:
        await queue.put(error)
    else:
        await queue.put(None)
