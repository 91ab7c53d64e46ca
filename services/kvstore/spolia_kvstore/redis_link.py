"""Keeps a session with Redis for as long as it runs, and opens the next one, 0.1 … 2 s apart, when one was lost.

While there is none, whoever asks is refused at once and nothing is sent. What ends a session is anything that is wrong
with Redis or the way to it: it does not answer in time, refuses the password, is loading, full, read-only, or cut off
from the rest of its cluster.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from spolia_core.errors import Unavailable
from spolia_kvstore.redis_keys import RedisKeys
from spolia_kvstore.redis_node import RedisNode
from spolia_kvstore.redis_scripts import Command
from spolia_kvstore.redis_session import RedisSession, Reply
from spolia_kvstore.redis_target import RedisTarget
from spolia_node.directory_turns import MAX_BACKOFF_S, Backoff
from spolia_node.logs import get_log

OPEN_TIMEOUT_S = 2.0
"""For all it takes to open a session. Nobody waits for it, and a cluster is asked node by node."""

log = get_log(__name__)


class RedisLink:
    """`on_up` is called on every new session, `on_news` for every message by channel and payload."""

    def __init__(
        self,
        target: RedisTarget,
        keys: RedisKeys,
        timeout_s: float,
        on_up: Callable[[], None],
        on_news: Callable[[bytes, bytes], None],
    ) -> None:
        self._target = target
        self._keys = keys
        self._timeout_s = timeout_s
        self._on_up = on_up
        self._on_news = on_news
        self._session: RedisSession | None = None
        self._nodes: list[RedisNode] = []
        self._task: asyncio.Task[None] | None = None
        self._last_said = ""

    @property
    def is_up(self) -> bool:
        """Whether the last thing heard from Redis was well."""
        return self._session is not None and not self._session.lost.done()

    def start(self) -> None:
        """Begins to connect. Needs a running event loop."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="redis-link")

    async def stop(self) -> None:
        """Disconnects. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def exchange(self, commands: Sequence[Command]) -> list[Reply]:
        """Replies in order. Raises `Unavailable`: at once while there is no session."""
        session = self._session
        if session is None:
            raise Unavailable(f"Redis at {self._target.address} is away")
        return await session.exchange(commands)

    async def _run(self) -> None:
        backoff = Backoff()
        while True:
            session: RedisSession | None = None
            try:
                async with asyncio.timeout(OPEN_TIMEOUT_S):
                    target = await self._target.located()
                    session = RedisSession(target, self._keys, self._timeout_s, self._nodes)
                    await session.open()
                self._say_lost(await self._serve(session, backoff))
            except Exception as error:
                self._say_lost(error)
            finally:
                self._session = None
                if session is not None:
                    await session.close()
            await asyncio.sleep(backoff.next_s())

    async def _serve(self, session: RedisSession, backoff: Backoff) -> Exception:
        """Lets the session be used until it is lost. One that did not last leaves the back-off as it was."""
        began = time.monotonic()
        self._nodes = session.nodes()
        self._session = session
        self._last_said = ""
        log.info("redis reached", address=session.address)
        reader = asyncio.create_task(self._read_news(session), name="redis-news")
        try:
            self._on_up()
            await asyncio.wait([session.lost])  # awaited itself, it would be cancelled with this task
            return session.lost.result()
        finally:
            if time.monotonic() - began > MAX_BACKOFF_S:
                backoff.reset()
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read_news(self, session: RedisSession) -> None:
        try:
            while True:
                news = await session.next_news()
                if news is not None:
                    self._on_news(*news)
                await asyncio.sleep(0)  # a flood of news is read without waiting: others have their turn
        except Exception as error:
            session.lose(error)

    def _say_lost(self, error: Exception) -> None:
        """Once for each reason: the next tries will mostly fail for the same."""
        said = self._target.said(error)
        if said != self._last_said:
            self._last_said = said
            log.warning("redis away", address=self._target.address, error=said)
