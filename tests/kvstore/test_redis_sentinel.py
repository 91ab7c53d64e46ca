"""A Redis that Sentinels keep up: where its primary is, and what a failover does to a backend."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from backend_worlds import LIVE, Ear, a_key, a_replica, eventually
from sentinel_server import WatchedRedis

from spolia_core.errors import InvalidRequest, Unavailable
from spolia_kvstore.redis_backend import RedisBackend
from spolia_kvstore.redis_node import RedisNode
from spolia_kvstore.redis_sentinel import Sentinels
from spolia_kvstore.redis_target import redis_target

KEY, OTHER = a_key(1), a_key(2)
TIMEOUT_S = 0.5


async def test_a_backend_follows_the_primary_through_a_failover(tmp_path: Path, prefix: str) -> None:
    with WatchedRedis(tmp_path) as redis:
        backend = RedisBackend(redis.url, prefix, timeout_s=20.0)
        ear = Ear(backend)
        await backend.start()
        try:
            await eventually(lambda: backend.reachable)
            await backend.publish([a_replica(KEY)])
            redis.primary.kill()
            await eventually(lambda: not backend.reachable)
            await eventually(lambda: backend.reachable)
            assert ear.num_reconnects == 2, "what a new primary may lack is said again"
            await backend.publish([a_replica(OTHER)])
            assert await backend.claim([OTHER], "a", 60.0, LIVE)
            assert "role:master" in redis.replica.ask("INFO", "replication")
        finally:
            await backend.close()


@asynccontextmanager
async def sentinels(answers: Sequence[tuple[str, int] | str | None]) -> AsyncIterator[Sentinels]:
    """Sentinels that say what they are told: an address, nothing, an error, or, with "", never anything."""
    servers: list[asyncio.Server] = []
    opened: list[asyncio.StreamWriter] = []

    async def start(answer: tuple[str, int] | str | None) -> RedisNode:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            opened.append(writer)
            await reader.readuntil(b"GET-MASTER-ADDR-BY-NAME")
            if isinstance(answer, tuple):
                host, port = answer
                writer.write(f"*2\r\n${len(host)}\r\n{host}\r\n${len(str(port))}\r\n{port}\r\n".encode())
            elif answer is None:
                writer.write(b"*-1\r\n")
            elif answer:
                writer.write(f"-{answer}\r\n".encode())

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        servers.append(server)
        return RedisNode("127.0.0.1", server.sockets[0].getsockname()[1])

    nodes = [await start(answer) for answer in answers]
    try:
        target = redis_target("redis+sentinel://" + ",".join(f"{n.host}:{n.port}" for n in nodes) + "/it", TIMEOUT_S)
        assert target.sentinels is not None
        yield target.sentinels
    finally:
        for writer in opened:
            writer.close()
        for server in servers:
            server.close()


async def test_most_of_those_that_answer_decide() -> None:
    here, there = ("10.0.0.1", 6379), ("10.0.0.2", 6379)
    async with sentinels([there, here, "", here, None]) as asked:
        assert await asked.primary() == RedisNode(*here)


async def test_none_that_knows_is_said_by_name() -> None:
    async with sentinels([None, "IDONTKNOW"]) as asked:
        with pytest.raises(Unavailable, match="no Sentinel knows the primary of it"):
            await asked.primary()


async def test_sentinels_that_are_away_do_not_keep_a_store_from_starting(prefix: str) -> None:
    backend = RedisBackend("redis+sentinel://127.0.0.1:1,127.0.0.1:2/it", prefix, timeout_s=TIMEOUT_S)
    await backend.start()
    try:
        with pytest.raises(Unavailable):
            await backend.claims([KEY])
    finally:
        await backend.close()


def test_a_url_says_who_is_asked_for_what() -> None:
    target = redis_target("rediss+sentinel://me:p%40ss@a,b:1,[::1]:2/it/3?sentinel_password=q&ssl_ca_certs=/ca", 1.0)
    assert target.sentinels is not None
    assert target.sentinels.nodes == (RedisNode("a", 26379), RedisNode("b", 1), RedisNode("::1", 2))
    assert target.sentinels.name == "it"
    assert (target.options["username"], target.options["password"], target.db) == ("me", "p@ss", 3)
    asked = target.sentinels.options
    assert (asked["username"], asked["password"], asked["db"]) == (None, "q", 0)
    assert asked["ssl_ca_certs"] == target.options["ssl_ca_certs"] == "/ca"
    assert "p@ss" not in repr(target) + target.address
    assert "'q'" not in repr(target)


@pytest.mark.parametrize(
    "rest", ["", "a", "a/", ",/it", "a b/it", "a:0/it", "a:x/it", "a/it/x", "a/it?no_such_option=1"]
)
def test_a_url_without_a_sentinel_or_a_name_is_refused(rest: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        redis_target(f"redis+sentinel://:secret@{rest}", 1.0)
    assert refused.value.field == "redis_url"
    assert "secret" not in str(refused.value)
