"""What a Redis that fails, hangs, comes back or refuses does to its backend, and what two stores see of each other."""

import asyncio
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

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
    captured_logs,
    connected,
    eventually,
    eventually_so,
)
from redis_server import RedisServer

from spolia_core.errors import InvalidRequest, Unavailable
from spolia_kvstore.objects import Tier
from spolia_kvstore.redis_backend import RedisBackend
from spolia_kvstore.redis_keys import RedisKeys

KEY, OTHER = a_key(1), a_key(2)
SECRET = "pass:w/ord"
SECRET_IN_URL = "pass%3Aw%2Ford"
QUICKLY_S = 1.0
TIMEOUT_S = 0.5


@pytest.fixture(scope="module", params=["server", "cluster"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis"), cluster=request.param == "cluster") as server:
        yield server


@pytest.fixture
def server(either: RedisServer) -> Iterator[RedisServer]:
    """One of each kind. A test may kill it or stop it: the next has it running again."""
    if not either.is_running:
        either.start()
    yield either
    if either.is_running:
        either.go_on()


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One for all tests that leave it as it was."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def prefix() -> str:
    return uuid4().hex


# Away and back


async def test_a_backend_that_was_never_connected_is_unavailable_at_once() -> None:
    backend = RedisBackend("redis://127.0.0.1:1")
    assert not backend.reachable
    with pytest.raises(Unavailable):
        await backend.claims([KEY])
    await backend.close()
    await backend.close()


async def test_start_does_not_wait_for_redis_and_finds_it_when_it_comes(tmp_path: Path, prefix: str) -> None:
    server = RedisServer(tmp_path)
    backend = RedisBackend(server.url, prefix)
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
    async with connected(server, prefix, TIMEOUT_S) as backend:
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
    async with connected(server, prefix, TIMEOUT_S) as backend:
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


# Passwords and URLs


@pytest.mark.parametrize("is_cluster", [False, True], ids=["server", "cluster"])
async def test_a_wrong_password_is_said_once_without_it_and_tried_again(
    tmp_path: Path, prefix: str, is_cluster: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer(tmp_path, cluster=is_cluster, password="right") as server, captured_logs() as lines:
        backend = RedisBackend(server.url.replace("right", SECRET_IN_URL), prefix)
        await backend.start()
        try:
            await eventually(lambda: bool(lines))
            await asyncio.sleep(0.5)  # two tries more
            assert not backend.reachable
            with pytest.raises(Unavailable) as refused:
                await backend.claims([KEY])
            told = f"{refused.value} {lines} {caplog.text}"
            assert [line["event"] for line in lines] == ["redis away"]
            assert "password" in lines[0]["error"]
            assert SECRET not in told
            assert SECRET_IN_URL not in told
            server.ask("CONFIG", "SET", "requirepass", SECRET)
            await eventually(lambda: backend.reachable)
        finally:
            await backend.close()
    assert SECRET not in str(lines)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        f"http://:{SECRET_IN_URL}@host",
        f"redis+cluster+cluster://:{SECRET_IN_URL}@host",
        f"redis://:{SECRET}@host:1",
        f"redis://:{SECRET_IN_URL}@host:seventy",
        f"redis://:{SECRET_IN_URL}@host:99999",
        f"redis://:{SECRET_IN_URL}@host?db=one",
        f"redis://:{SECRET_IN_URL}@host?no_such_option=1",
        f"redis+cluster://:{SECRET_IN_URL}@host/1",
        f"redis+cluster://:{SECRET_IN_URL}@host?no_such_option=1",
        f"unix://:{SECRET_IN_URL}@",
    ],
)
def test_a_bad_url_is_refused_by_field_and_never_repeated(url: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        RedisBackend(url)
    told = f"{refused.value} {refused.value.actual}"
    assert refused.value.field == "redis_url"
    assert refused.value.__suppress_context__
    for part in (SECRET, SECRET_IN_URL, "w/ord", "seventy"):
        assert part not in told


@pytest.mark.parametrize("prefix", ["", "a{b", "a}b", "a b", "x" * 65, "ä"])
def test_a_prefix_that_could_be_a_hash_tag_is_refused(prefix: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        RedisBackend("redis://localhost", prefix)
    assert refused.value.field == "redis_prefix"


@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+cluster", "rediss+cluster", "REDIS"])
def test_every_scheme_is_known(scheme: str) -> None:
    RedisBackend(f"{scheme}://user:{SECRET_IN_URL}@localhost:6380")


async def test_a_unix_socket_will_do(tmp_path: Path, prefix: str) -> None:
    folder = Path(tempfile.mkdtemp(prefix="redis-"))  # short: the kernel's limit is about 100 bytes
    try:
        with RedisServer(tmp_path, socket_path=folder / "redis.sock"):
            backend = RedisBackend(f"unix://{folder}/redis.sock", prefix)
            await backend.start()
            try:
                await eventually(lambda: backend.reachable)
                assert await backend.claims([KEY]) == [None]
            finally:
                await backend.close()
    finally:
        shutil.rmtree(folder)


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
    backend = RedisBackend(f"{lasting.url}/3", prefix)
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
    backend = RedisBackend(lasting.url, prefix, replica_ttl_s=0.05)
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
