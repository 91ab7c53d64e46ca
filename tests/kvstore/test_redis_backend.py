"""What two stores see of each other in Redis, what is kept there, and calls that are cancelled."""

import asyncio

import pytest
from backend_worlds import (
    HERE,
    LIVE,
    TENANT,
    THERE,
    Ear,
    a_key,
    a_replica,
    all_news_has_come,
    connected,
    eventually,
    eventually_so,
)
from redis_server import RedisServer

from spolia_core.errors import Unavailable
from spolia_kvstore.objects import Tier
from spolia_kvstore.redis_backend import RedisBackend
from spolia_kvstore.redis_keys import RedisKeys

KEY, OTHER = a_key(1), a_key(2)
TIMEOUT_S = 0.5


# Several stores


async def test_two_stores_see_each_others_replicas_claims_members_and_news(server: RedisServer, prefix: str) -> None:
    async with connected(server, prefix) as here, connected(server, prefix) as there:
        ear = Ear(there)
        await here.publish([a_replica(KEY)])
        assert await there.locate(TENANT, [KEY.chunk_id], LIVE) == {KEY.chunk_id: [a_replica(KEY)]}
        assert (await there.claim([KEY], "b", 60.0, LIVE))[0].is_stored

        await here.claim([OTHER], "a", 60.0, LIVE)
        (held,) = await there.claim([OTHER], "b", 60.0, LIVE)
        assert held.lease is not None
        assert held.lease.owner == "a"
        await here.publish([a_replica(OTHER)])
        await eventually(lambda: ear.ended == [OTHER])

        session = await here.next_session()
        assert await there.next_session() > session
        await here.renew_member("node", session, b"record", 60.0)
        await eventually(lambda: ear.num_member_changes == 1)
        assert [member.node_id for member in await there.members()] == ["node"]
        await there.drop_member("node", session)
        assert await here.members() == []


async def test_of_two_stores_that_claim_at_once_one_is_granted(server: RedisServer, prefix: str) -> None:
    keys = [a_key(number) for number in range(100)]
    async with connected(server, prefix) as here, connected(server, prefix) as there:
        claims = [
            backend.claim([key], owner, 60.0, LIVE) for key in keys for backend, owner in ((here, HERE), (there, THERE))
        ]
        answers = [answer.lease for (answer,) in await asyncio.gather(*claims)]
    assert [lease and lease.owner for lease in answers[::2]] == [lease and lease.owner for lease in answers[1::2]]


async def test_prefixes_are_worlds_of_their_own(lasting: RedisServer) -> None:
    async with connected(lasting, "one") as one, connected(lasting, "one:two") as other:
        ear = Ear(other)
        await one.publish([a_replica(KEY)])
        await one.claim([OTHER], "a", 60.0, LIVE)
        await one.unclaim([OTHER], None)
        await one.renew_member("node", await one.next_session(), b"", 60.0)
        assert await other.locate(TENANT, [KEY.chunk_id], LIVE) == {}
        assert await other.members() == []
        await all_news_has_come(other, ear)
        assert (ear.ended, ear.num_member_changes) == ([], 0)


async def test_databases_of_one_redis_share_no_news(lasting: RedisServer, prefix: str) -> None:
    backend = RedisBackend(f"{lasting.url}/3", prefix, timeout_s=20.0)
    ear = Ear(backend)
    await backend.start()
    try:
        await eventually(lambda: backend.reachable)
        async with connected(lasting, prefix) as other:
            await other.claim([KEY], "a", 60.0, LIVE)
            await other.unclaim([KEY], "a")
        await all_news_has_come(backend, ear)
        assert ear.ended == []
    finally:
        await backend.close()


# What is kept


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("1:store-a", b"\x02later"),
        ("1:store-a", b""),
        ("1:store-a", b"\x01\xff"),
        ("9:store-a", b"\x01"),
        ("x", b"\x01"),
    ],
)
async def test_what_this_version_cannot_read_is_no_replica(
    lasting: RedisServer, prefix: str, field: str, value: bytes
) -> None:
    async with connected(lasting, prefix) as backend:
        await backend.publish([a_replica(KEY, Tier.DISK, THERE)])
        lasting.ask("HSET", RedisKeys(prefix).replicas(KEY), field, value)
        found = await backend.locate(TENANT, [KEY.chunk_id], LIVE)
        assert found == {KEY.chunk_id: [a_replica(KEY, Tier.DISK, THERE)]}


async def test_what_cannot_be_read_by_its_version_does_not_stand_in_the_way_of_a_claim(
    lasting: RedisServer, prefix: str
) -> None:
    async with connected(lasting, prefix) as backend:
        lasting.ask("HSET", RedisKeys(prefix).replicas(KEY), "1:store-a", b"\x02later", "9:store-a", b"\x01")
        (answer,) = await backend.claim([KEY], "a", 60.0, LIVE)
        assert answer.lease is not None


async def test_replicas_that_nobody_publishes_again_are_forgotten(lasting: RedisServer, prefix: str) -> None:
    backend = RedisBackend(lasting.url, prefix, replica_ttl_s=0.05, timeout_s=20.0)
    await backend.start()
    try:
        await eventually(lambda: backend.reachable)
        await backend.publish([a_replica(KEY)])

        async def is_forgotten() -> bool:
            return not await backend.locate(TENANT, [KEY.chunk_id], LIVE)

        await eventually_so(is_forgotten)
    finally:
        await backend.close()


# Cancelling and closing


async def test_cancelled_calls_leave_the_backend_usable(server: RedisServer, prefix: str) -> None:
    keys = [a_key(number) for number in range(100)]
    async with connected(server, prefix) as backend:
        ear = Ear(backend)
        for number, key in enumerate(keys):
            await backend.claim([key], f"owner-{number}", 60.0, LIVE)
        server.stop()
        calls = [asyncio.create_task(backend.claims([key])) for key in keys]
        await asyncio.sleep(0.05)  # the first of them have been sent
        for call in calls:
            call.cancel()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(answer) for answer in answers} == {asyncio.CancelledError}
        server.go_on()
        for number, leases in enumerate(await asyncio.gather(*(backend.claims([key]) for key in keys))):
            assert leases[0] is not None
            assert leases[0].owner == f"owner-{number}", "a reply was read by another call"
        assert ear.num_reconnects == 0


async def test_calls_cancelled_at_any_moment_never_mix_up_replies(lasting: RedisServer, prefix: str) -> None:
    async with connected(lasting, prefix) as backend:
        for number in range(10):
            await backend.claim([a_key(number)], f"owner-{number}", 60.0, LIVE)

        async def owner(number: int) -> str:
            (lease,) = await backend.claims([a_key(number)])
            return lease.owner if lease is not None else ""

        for num_steps in range(12):
            calls = [asyncio.create_task(owner(number)) for number in range(10)]
            for _ in range(num_steps):
                await asyncio.sleep(0)
            for call in calls[::2]:
                call.cancel()
            answers = await asyncio.gather(*calls, return_exceptions=True)
            for number, answer in enumerate(answers):
                assert isinstance(answer, asyncio.CancelledError) or answer == f"owner-{number}"
        assert backend.reachable


@pytest.mark.filterwarnings("error")
async def test_closing_ends_calls_under_way_and_leaves_nothing(server: RedisServer, prefix: str) -> None:
    before = asyncio.all_tasks()
    backend = RedisBackend(server.url, prefix, timeout_s=TIMEOUT_S)
    await backend.start()
    await eventually(lambda: backend.reachable)
    server.stop()
    calls = [asyncio.create_task(backend.claims([KEY])) for _ in range(50)]
    await asyncio.sleep(0.02)
    await backend.close()
    await backend.close()
    assert {type(answer) for answer in await asyncio.gather(*calls, return_exceptions=True)} == {Unavailable}
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
    server.go_on()
    await eventually(lambda: num_clients(server) == 1)
    with pytest.raises(Unavailable):
        await backend.claims([KEY])


def num_clients(server: RedisServer) -> int:
    """As Redis counts them; the one that asks is among them."""
    told = dict(line.split(":", 1) for line in server.ask("INFO").splitlines() if ":" in line)
    return int(told["connected_clients"])
