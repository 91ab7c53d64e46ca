"""Several streams read as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def merged_streams(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """What the streams give, as it comes, each stream's in order. Takes the streams.

    Raises what the first to fail raises; then, and when it is closed early, all are closed before it ends.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield item
        return
    items: asyncio.Queue[T | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    items.put_nowait(item)
        finally:
            items.put_nowait(None)

    pumps = [asyncio.ensure_future(pump(stream)) for stream in streams]
    try:
        num_left = len(pumps)
        while num_left:
            given = await items.get()
            if given is not None:
                yield given
                continue
            num_left -= 1
            for done in pumps:
                if done.done() and not done.cancelled() and (error := done.exception()) is not None:
                    raise error
        await asyncio.gather(*pumps)
    finally:
        for each in pumps:
            each.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
