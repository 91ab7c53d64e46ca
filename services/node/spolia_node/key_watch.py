"""The book of API keys as it is now: read at the start, and again whenever it has changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from spolia_core.errors import SpoliaError
from spolia_core.key_book import KeyBook
from spolia_core.key_place import KeyPlace
from spolia_node.logs import get_log
from spolia_node.metrics import Metrics

LOOK_EVERY_S = 1.0
"""How old a change may get before it counts. Files on a mounted volume and Redis tell nobody that they changed, and a
book is a few kilobytes."""

log = get_log(__name__)


class KeyWatch:
    """Reads a place every second. `start` it on a running loop, `stop` it at the end.

    Making one reads the place, and raises what that raises. Later a place that is away, or whose content is wrong,
    leaves the book as it is: that is logged once for each reason, and counted.
    """

    def __init__(
        self, place: KeyPlace, metrics: Metrics, on_change: Callable[[KeyBook], None] = lambda book: None
    ) -> None:
        """`on_change` is called with each new book; not with the first."""
        self._place = place
        self._on_change = on_change
        self._content = place.read()
        self._book = KeyBook.from_bytes(self._content)
        self._last_said = ""
        self._task: asyncio.Task[None] | None = None
        reads = metrics.counter("spolia_key_book_reads_total", "Looks at the API keys, by what came of it.", "outcome")
        self._counts = {outcome: reads.labels(outcome) for outcome in ("changed", "unchanged", "failed")}

    @property
    def book(self) -> KeyBook:
        """The newest that could be read."""
        return self._book

    def start(self) -> None:
        """Begins to look. Needs a running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="key-watch")

    async def stop(self) -> None:
        """Ends looking. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def look(self) -> None:
        """Takes over what is there now."""
        try:
            content = await asyncio.to_thread(self._place.read)
            changed = content != self._content
            book = KeyBook.from_bytes(content) if changed else self._book
        except SpoliaError as error:
            self._counts["failed"].inc()
            self._say(error.message)
            return
        self._counts["changed" if changed else "unchanged"].inc()
        self._last_said = ""
        if changed:
            self._content, self._book = content, book
            log.info("keys replaced", place=self._place.name, num_keys=len(book.keys))
            self._on_change(book)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self.look()
            except Exception:
                log.exception("keys could not be looked at")

    def _say(self, problem: str) -> None:
        if problem != self._last_said:
            self._last_said = problem
            log.warning("new keys cannot be used; the old ones stay", place=self._place.name, error=problem)
