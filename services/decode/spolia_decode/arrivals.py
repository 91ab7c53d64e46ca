"""Chunks on their way into this node's memory, so that requests that miss the same one bring it once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable


class Arrivals:
    """Who brings which chunk. Used from one event loop.

    Whoever began to bring a chunk goes on with it whatever else it waits for: so none waits for one that waits for it.
    """

    def __init__(self) -> None:
        self._ended: dict[bytes, asyncio.Event] = {}

    def begin(self, chunk_ids: Iterable[bytes]) -> set[bytes]:
        """The ids that the caller is to bring, because nobody else does. It must `end` each."""
        mine = {chunk_id for chunk_id in chunk_ids if chunk_id not in self._ended}
        self._ended.update((chunk_id, asyncio.Event()) for chunk_id in mine)
        return mine

    def end(self, chunk_id: bytes) -> None:
        """It came, or the caller gave it up: those who wait look again."""
        self._ended.pop(chunk_id).set()

    async def wait(self, chunk_ids: Iterable[bytes]) -> None:
        """Returns when nobody who brings one of these now does so any longer."""
        for ended in [self._ended[chunk_id] for chunk_id in chunk_ids if chunk_id in self._ended]:
            await ended.wait()
