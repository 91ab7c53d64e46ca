"""What a Redis that fails, hangs, refuses or comes back does to its backend."""

import asyncio
import time
from pathlib import Path

import pytest
from backend_worlds import HERE, LIVE, TENANT, Ear, a_key, a_replica, all_news_has_come, connected, eventually
from captured_logs import captured_logs
from redis_server import RedisServer

from spolia_core.errors import Unavailable
from spolia_kvstore.objects import Tier
from spolia_kvstore.redis_backend import RedisBackend
from spolia_kvstore.redis_keys import RedisKeys

KEY, OTHER = a_key(1), a_key(2)
TIMEOUT_S = 2.0
"""Of a Redis that is to hang. A busy one that does not must answer in time."""
LONG_S, QUICKLY_S = 60.0, 10.0
"""What nobody is to wait for, and what tells that nobody did."""


async def test_a_backend_that_was_never_connected_is_unavailable_at_once() -> None:
    backend = RedisBackend("redis://127.0.0.1:1")
    assert not backend.reachable
    with pytest.raises(Unavailable):
        await backend.claims([KEY])
    await backend.close()
    await backend.close()


async def test_start_does_not_wait_for_redis_and_finds_it_when_it_comes(tmp_path: Path, prefix: str) -> None:
    server = RedisServer(tmp_path)
    backend = RedisBackend(server.url, prefix, timeout_s=20.0)
    ear = Ear(backend)
    await backend.start()
    try:
        assert not backend.reachable
        with server:
            await eventually(lambda: backend.reachable)
            assert ear.num_reconnects == 1
            assert await backend.claims([KEY]) == [None]
    finally:
        await backend.close()


async def test_a_killed_redis_is_unavailable_quickly_and_from_then_on_at_once(server: RedisServer, prefix: str) -> None:
    async with connected(server, prefix, LONG_S) as backend:
        server.kill()
        began = time.monotonic()
        with pytest.raises(Unavailable):
            await backend.claim([KEY], "a", 60.0, LIVE)
        assert time.monotonic() - began < QUICKLY_S
        assert not backend.reachable
        began = time.monotonic()
        for _ in range(100):
            await every_method_is_unavailable(backend)
        assert time.monotonic() - began < QUICKLY_S


async def test_a_killed_redis_is_noticed_though_nobody_asks(server: RedisServer, prefix: str) -> None:
    async with connected(server, prefix) as backend:
        server.kill()
        await eventually(lambda: not backend.reachable)


async def test_a_redis_restarted_empty_is_used_again_by_itself(server: RedisServer, prefix: str) -> None:
    async with connected(server, prefix) as backend:
        ear = Ear(backend)
        await backend.publish([a_replica(KEY)])
        session = await backend.next_session()
        server.restart()
        await eventually(lambda: ear.num_reconnects > 0 and backend.reachable)
        assert await backend.locate(TENANT, [KEY.chunk_id], LIVE) == {}
        (answer,) = await backend.claim([KEY], "a", 60.0, LIVE)
        assert answer.lease is not None
        await backend.publish([a_replica(KEY)])
        await all_news_has_come(backend, ear)
        assert ear.ended == [KEY]
        assert await backend.next_session() > session, "a session given before must stay the older one"


async def test_a_redis_that_forgot_its_scripts_is_told_them_again(server: RedisServer, prefix: str) -> None:
    async with connected(server, prefix) as backend:
        ear = Ear(backend)
        for number in range(3):
            server.ask("SCRIPT", "FLUSH")
            keys = [a_key(100 * number + index) for index in range(100)]
            assert all(answer.lease for answer in await backend.claim(keys, "a", 60.0, LIVE))
        assert ear.num_reconnects == 0


async def test_a_hung_redis_is_unavailable_within_the_timeout_and_comes_back(server: RedisServer, prefix: str) -> None:
    async with connected(server, prefix, TIMEOUT_S) as backend:
        ear = Ear(backend)
        server.stop()
        began = time.monotonic()
        answers = await asyncio.gather(*(backend.claims([KEY]) for _ in range(100)), return_exceptions=True)
        assert time.monotonic() - began < TIMEOUT_S + QUICKLY_S
        assert {type(answer) for answer in answers} == {Unavailable}
        assert not backend.reachable
        server.go_on()
        await eventually(lambda: backend.reachable)
        assert ear.num_reconnects == 1
        assert await backend.claims([KEY]) == [None]


async def test_a_hung_redis_is_noticed_though_nobody_asks(lasting: RedisServer, prefix: str) -> None:
    async with connected(lasting, prefix, 0.1) as backend:
        lasting.stop()
        try:
            await eventually(lambda: not backend.reachable)
        finally:
            lasting.go_on()


@pytest.mark.parametrize(
    ("spoil", "mend"),
    [
        (["REPLICAOF", "127.0.0.1", "1"], ["REPLICAOF", "NO", "ONE"]),
        (["CONFIG", "SET", "maxmemory", "1"], ["CONFIG", "SET", "maxmemory", "0"]),
        (["ACL", "SETUSER", "default", "-publish"], ["ACL", "SETUSER", "default", "+publish"]),
        (["ACL", "SETUSER", "default", "-subscribe"], ["ACL", "SETUSER", "default", "+subscribe"]),
    ],
    ids=["read-only", "full", "may not publish", "may not subscribe"],
)
async def test_a_redis_that_refuses_what_we_do_is_away_until_it_does_not(
    lasting: RedisServer, prefix: str, spoil: list[str], mend: list[str]
) -> None:
    async with connected(lasting, prefix) as backend:
        ear = Ear(backend)
        assert lasting.ask(*spoil).startswith("+OK")
        try:
            lasting.ask("CLIENT", "KILL", "TYPE", "pubsub")
            await eventually(lambda: not backend.reachable)
            await asyncio.sleep(0.3)  # several tries
            assert (backend.reachable, ear.num_reconnects) == (False, 0)
        finally:
            assert lasting.ask(*mend).startswith("+OK")
        await eventually(lambda: backend.reachable)


async def test_a_script_that_redis_refuses_takes_the_backend_away(lasting: RedisServer, prefix: str) -> None:
    async with connected(lasting, prefix) as backend:
        lasting.ask("REPLICAOF", "127.0.0.1", "1")
        try:
            with pytest.raises(Unavailable):
                await backend.claim([KEY], "a", 60.0, LIVE)
            assert not backend.reachable
        finally:
            lasting.ask("REPLICAOF", "NO", "ONE")


async def test_a_foreign_value_under_our_name_spoils_one_call_only(lasting: RedisServer, prefix: str) -> None:
    async with connected(lasting, prefix) as backend:
        lasting.ask("SET", RedisKeys(prefix).replicas(KEY), "not a hash")
        with pytest.raises(Unavailable, match="WRONGTYPE"):
            await backend.claim([KEY], "a", 60.0, LIVE)
        assert backend.reachable
        assert await backend.claims([OTHER]) == [None]


async def test_a_lost_subscription_is_taken_for_a_lost_redis(lasting: RedisServer, prefix: str) -> None:
    async with connected(lasting, prefix) as backend:
        ear = Ear(backend)
        lasting.ask("CLIENT", "KILL", "TYPE", "pubsub")
        await eventually(lambda: ear.num_reconnects == 1)
        await backend.claim([KEY], "a", 60.0, LIVE)
        await backend.unclaim([KEY], "a")
        await all_news_has_come(backend, ear)
        assert ear.ended == [KEY]


async def test_why_redis_is_away_is_said_once(prefix: str) -> None:
    with captured_logs() as lines:
        backend = RedisBackend("redis://127.0.0.1:1", prefix)
        await backend.start()
        await eventually(lambda: bool(lines))
        await asyncio.sleep(0.5)  # two tries more
        await backend.close()
    assert [line["event"] for line in lines] == ["redis away"]
    assert lines[0]["address"] == "redis://127.0.0.1:1"


async def every_method_is_unavailable(backend: RedisBackend) -> None:
    for call in (
        backend.publish([a_replica(KEY)]),
        backend.withdraw(HERE, [KEY], Tier.RAM),
        backend.locate(TENANT, [KEY.chunk_id], LIVE),
        backend.claim([KEY], "a", 60.0, LIVE),
        backend.unclaim([KEY], None),
        backend.claims([KEY]),
        backend.next_session(),
        backend.renew_member("node", 1, b"", 60.0),
        backend.drop_member("node", 1),
        backend.members(),
    ):
        with pytest.raises(Unavailable):
            await call
