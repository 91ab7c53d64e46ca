"""One stretch of being connected to Redis: from when it answered until the first thing that went wrong.

Then it is closed with all its connections, and another one is opened: nothing half read or half known is carried over.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol, cast

from redis.asyncio import Connection, RedisCluster
from redis.exceptions import NoScriptError, ResponseError

from spolia_core.errors import Unavailable
from spolia_kvstore.redis_keys import RedisKeys
from spolia_kvstore.redis_node import RedisNode
from spolia_kvstore.redis_scripts import PROBE, Argument, Command, call
from spolia_kvstore.redis_target import Client, RedisTarget

Reply = Any
"""What Redis said; the asker knows its shape."""

MAX_CALLS = 16
"""Exchanges under way at once, each on a connection of its own; the others wait their turn."""

BATCH_COMMANDS = 256
"""Commands sent before their replies are read: a round trip for each would be slow, and one for all would hold up Redis
and the event loop."""

QUIET_S = 1.0
"""After that long without news, Redis is asked whether it is there."""

_AWAY = re.compile(
    r"\b(LOADING|READONLY|CLUSTERDOWN|MASTERDOWN|BUSY|MISCONF|OOM|NOREPLICAS|NOAUTH|NOPERM|WRONGPASS|MOVED|ASK|TRYAGAIN)\b"
)
"""Refusals that are of the server, not of the call. A script's carry them in the middle of their text."""


class _Pipeline(Protocol):
    """What the pipelines of both clients have in common."""

    def execute_command(self, *args: Argument) -> object: ...

    async def execute(self, raise_on_error: bool) -> list[Reply]: ...


class RedisSession:
    """`open`, then `exchange` and `next_news` until something raises; `lost` says what. Always `close`."""

    def __init__(self, target: RedisTarget, keys: RedisKeys, timeout_s: float, nodes: Sequence[RedisNode]) -> None:
        self.lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self._target = target
        self._keys = keys
        self._timeout_s = timeout_s
        self._client = target.client(nodes)
        self._news: Connection | None = None
        self._turns = asyncio.Semaphore(MAX_CALLS)

    @property
    def address(self) -> str:
        """Where it is, without the password."""
        return self._target.address

    async def open(self) -> None:
        """Connects, listens for news, and tries whether Redis lets us do what we do."""
        node = await self._any_node()
        self._news = self._target.connection(node)
        await cast(Any, self._news).connect()  # has no types
        channels = (self._keys.claims_channel, self._keys.members_channel)
        await self._news.send_command("SUBSCRIBE", *channels)
        for _ in channels:
            await self._news.read_response()
        await _exchange(self._client, [call(PROBE, [self._keys.member("probe")], self._keys.claims_channel)])

    def nodes(self) -> list[RedisNode]:
        """Where else the cluster can be found; none where there is no cluster."""
        if not isinstance(self._client, RedisCluster):
            return []
        return [RedisNode(str(node.host), int(node.port)) for node in self._client.get_nodes()]

    async def exchange(self, commands: Sequence[Command]) -> list[Reply]:
        """Replies in order. Each batch has the whole time-out. Raises `Unavailable`."""
        replies: list[Reply] = []
        for start in range(0, len(commands), BATCH_COMMANDS):
            async with self._turn():
                replies += await _exchange(self._client, commands[start : start + BATCH_COMMANDS])
        return replies

    async def next_news(self) -> tuple[bytes, bytes] | None:
        """Channel and message; None when Redis answered that there are none. Raises when it does not answer."""
        assert self._news is not None, "open() comes first"
        message = await self._news.read_response(timeout=QUIET_S)
        if message is None:
            await self._news.send_command("PING")
            message = await self._news.read_response(timeout=self._timeout_s)
        if message is None:
            raise TimeoutError("no answer to a ping")
        return (message[1], message[2]) if message[0] == b"message" else None

    def lose(self, error: Exception) -> None:
        """Ends the session: nobody begins an exchange any more."""
        if not self.lost.done():
            self.lost.set_result(error)

    async def close(self) -> None:
        """Disconnects, at once for exchanges under way too, and returns when the last of them is over."""
        self.lose(Unavailable("closed"))
        if self._news is not None:
            with contextlib.suppress(Exception):
                await self._news.disconnect(nowait=True)
        await _disconnect(self._client)
        for _ in range(MAX_CALLS):
            await self._turns.acquire()
        await _disconnect(self._client)  # one that was just connecting then

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        async with self._turns:
            if self.lost.done():
                raise self.unavailable(self.lost.result())
            try:
                async with asyncio.timeout(self._timeout_s):
                    yield
            except Exception as error:  # redis-py raises all sorts when a connection goes: any of them ends this one
                if not _is_of_the_call(error):
                    self.lose(error)
                raise self.unavailable(error) from error

    def unavailable(self, error: Exception) -> Unavailable:
        """`error` as the caller meets it."""
        return Unavailable(f"Redis at {self._target.address} cannot be used: {self._target.said(error)}")

    async def _any_node(self) -> RedisNode | None:
        """In a cluster every node passes on news."""
        if not isinstance(self._client, RedisCluster):
            return None
        await self._client.initialize()
        node = self._client.get_random_node()
        return RedisNode(str(node.host), int(node.port))


async def _exchange(client: Client, commands: Sequence[Command]) -> list[Reply]:
    """Raises the first error among the replies."""
    replies = await _pipelined(client, [command.args for command in commands])
    unknown = [index for index, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
    if unknown:
        again = await _pipelined(client, [commands[index].with_text for index in unknown])
        for index, reply in zip(unknown, again, strict=True):
            replies[index] = reply
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies


async def _pipelined(client: Client, commands: Sequence[tuple[Argument, ...]]) -> list[Reply]:
    """Replies in order, errors among them. No transaction: each command stands for itself."""
    pipeline = cast(_Pipeline, client.pipeline(transaction=False))
    for args in commands:
        pipeline.execute_command(*args)
    return await pipeline.execute(raise_on_error=False)


def _is_of_the_call(error: Exception) -> bool:
    """Whether Redis is well and refused only this: a name of ours holds another's value, for example."""
    return isinstance(error, ResponseError) and not _AWAY.search(f"{error.status_code or ''} {error}")


async def _disconnect(client: Client) -> None:
    with contextlib.suppress(Exception):  # they are gone either way
        if isinstance(client, RedisCluster):
            # Not `aclose`: it does nothing once the client has noticed an error by itself.
            await client.nodes_manager.aclose()
            await client.nodes_manager.aclose("startup_nodes")
        await client.aclose()
