"""Where the primary of a Redis is that Sentinels keep up.

It is asked for before every session: whatever ends one, a failover above all, leads to the primary there is then.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from redis.asyncio import ConnectionPool, Redis

from spolia_core.errors import Unavailable
from spolia_kvstore.redis_node import RedisNode
from spolia_node.addresses import is_address

DEFAULT_SENTINEL_PORT = 26379
ASK_TIMEOUT_S = 1.0
"""For all of them, side by side."""


@dataclass(frozen=True, slots=True)
class SentinelURL:
    """`[user:password@]HOST[:PORT],…/NAME[/DB][?options]`, taken apart. Raises `ValueError` where it is not that."""

    nodes: tuple[RedisNode, ...]
    name: str
    """What the Sentinels call the primary and its replicas."""
    rest: str
    """The same for one Redis: login, database, options."""

    @property
    def shown(self) -> str:
        """For logs: without the login."""
        return f"{','.join(f'{node.host}:{node.port}' for node in self.nodes)}/{self.name}"

    @classmethod
    def read(cls, text: str) -> SentinelURL:
        """`text` is what follows "://"."""
        parts = urlsplit(f"redis://{text}")
        login, at, hosts = parts.netloc.rpartition("@")
        name, _, db = unquote(parts.path.strip("/")).partition("/")
        if not name:
            raise ValueError("names no primary")
        if db and not db.isdecimal():
            raise ValueError("names a database that is no number")
        query = f"?{parts.query}" if parts.query else ""
        return cls(tuple(_node(host) for host in hosts.split(",")), name, f"{login}{at}localhost/{db}{query}")


@dataclass(frozen=True, slots=True)
class Sentinels:
    """Who knows the primary. `options` are redis-py's, for connections to the Sentinels themselves."""

    nodes: tuple[RedisNode, ...]
    name: str
    options: Mapping[str, Any] = field(repr=False)

    async def primary(self) -> RedisNode:
        """Where most of those say that answer in time: one that is cut off from the others may not know it yet.

        Raises `Unavailable` when none knows.
        """
        asked = [asyncio.ensure_future(self._ask(node)) for node in self.nodes]
        try:
            await asyncio.wait(asked, timeout=ASK_TIMEOUT_S)
        finally:
            for task in asked:
                task.cancel()
            answers = await asyncio.gather(*asked, return_exceptions=True)
        said = Counter(answer for answer in answers if isinstance(answer, RedisNode))
        if not said:
            why = sorted({str(answer) or "no answer in time" for answer in answers})
            raise Unavailable(f"no Sentinel knows the primary of {self.name}: {'; '.join(why)}")
        return said.most_common(1)[0][0]

    async def _ask(self, node: RedisNode) -> RedisNode:
        pool = ConnectionPool(**{**self.options, "host": node.host, "port": node.port})
        client: Any = Redis.from_pool(pool)  # its commands have no types
        try:
            answer = await client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.name)
        finally:
            await client.aclose()
        if answer is None:
            raise Unavailable(f"{node.host}:{node.port} watches no {self.name}")
        host, port = answer
        return RedisNode(host.decode(), int(port))


def _node(text: str) -> RedisNode:
    has_port = ":" in text.rpartition("]")[2]
    address = text if has_port else f"{text}:{DEFAULT_SENTINEL_PORT}"
    if not is_address(address):
        raise ValueError("names a Sentinel that is no address")
    host, _, port = address.rpartition(":")
    return RedisNode(host.strip("[]"), int(port))
