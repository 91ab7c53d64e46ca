"""Chunks on their way into this node's memory, so that requests that miss the same one bring it once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class Arrivals:
    """Who brings which chunk. Used from one event loop.

    A request brings what nobody else does, and only when that is done waits for the rest: so none waits for one that
    waits for it.
    """

    def __init__(self) -> None:
        self._ended: dict[bytes, asyncio.Event] = {}

    @contextmanager
    def bringing(self, chunk_ids: Iterable[bytes]) -> Iterator[set[bytes]]:
        """The ids that the caller is to bring. Whether it did or not, those who wait look again at the end."""
        mine = {chunk_id: asyncio.Event() for chunk_id in chunk_ids if chunk_id not in self._ended}
        self._ended.update(mine)
        try:
            yield set(mine)
        finally:
            for chunk_id, ended in mine.items():
                del self._ended[chunk_id]
                ended.set()

    async def wait(self, chunk_ids: Iterable[bytes]) -> None:
        """Returns when nobody who brings one of these now does so any longer."""
        for ended in [self._ended[chunk_id] for chunk_id in chunk_ids if chunk_id in self._ended]:
            await ended.wait()
