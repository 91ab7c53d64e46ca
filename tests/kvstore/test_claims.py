"""Single flight: one owner at a time, everyone who waits is woken, and a backend that is away costs little."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from fake_backend import FakeBackend, FakeShared
from kvstore_worlds import HandClock, eventually, make_record

from spolia_core.errors import Unavailable
from spolia_kvstore.backend import ClaimAnswer, ClaimLease
from spolia_kvstore.catalog import Catalog
from spolia_kvstore.claims import Claims
from spolia_kvstore.embedded_backend import EmbeddedBackend
from spolia_kvstore.objects import ObjectKey

KEY, OTHER, THIRD = (make_record(number, 1).key for number in (1, 2, 3))


def alone(clock: Callable[[], float] | None = None) -> Claims:
    """Claims of a store that shares no index."""
    hand = clock or HandClock()
    local = EmbeddedBackend(Catalog(), hand, hand)
    return Claims(local, local)


async def owner_of(claims: Claims, key: ObjectKey) -> str:
    (lease,) = await claims.holders([key])
    return "" if lease is None else lease.owner


async def take(claims: Claims, key: ObjectKey, owner: str, ttl_s: float = 60.0) -> ClaimAnswer:
    (answer,) = await claims.take([key], owner, ttl_s, ())
    return answer


async def wait(claims: Claims, *keys: ObjectKey, timeout_s: float = 60.0) -> None:
    """As a waiting Claim does: listens, looks, and waits for the first change."""
    with claims.listening(keys) as news:
        answers = [ClaimAnswer(lease=lease) for lease in await claims.holders(keys)]
        await claims.wait(news, answers, timeout_s)


async def waiting(claims: Claims, *keys: ObjectKey) -> asyncio.Task[None]:
    task = asyncio.create_task(wait(claims, *keys))
    await eventually(lambda: claims.num_waiters == len(set(keys)))
    for _ in range(3):  # to its wait
        await asyncio.sleep(0)
    assert not task.done()
    return task


async def test_a_claim_is_held_by_the_first_until_it_lapses() -> None:
    clock = HandClock()
    claims = alone(clock)
    for asker in ("a", "b"):
        assert (await take(claims, KEY, asker, 10.0)).lease == ClaimLease("a", 10.0)
    clock.now += 10.0
    assert await owner_of(claims, KEY) == ""
    assert (await take(claims, KEY, "b", 10.0)).lease == ClaimLease("b", 10.0)


async def test_the_owner_renews() -> None:
    clock = HandClock()
    claims = alone(clock)
    await take(claims, KEY, "a", 10.0)
    clock.now += 9.0
    assert (await take(claims, KEY, "a", 10.0)).lease == ClaimLease("a", 10.0)
    assert claims.num_live() == 1


async def test_only_the_owner_releases() -> None:
    claims = alone()
    await take(claims, KEY, "a")
    assert await claims.release([KEY], "b") == 0
    assert await owner_of(claims, KEY) == "a"
    assert await claims.release([KEY, OTHER], "a") == 1
    assert await claims.release([KEY], "a") == 0


async def by_release(claims: Claims) -> None:
    await claims.release([OTHER], "a")


async def by_store(claims: Claims) -> None:
    await claims.stored([OTHER], is_told=False)


async def by_end_of_node(claims: Claims) -> None:
    await claims.end_of_node("a")


@pytest.mark.parametrize("ending", [by_release, by_store, by_end_of_node])
async def test_a_waiter_is_woken_when_any_of_its_claims_ends(ending: Callable[[Claims], Awaitable[None]]) -> None:
    claims = alone()
    for key in (KEY, OTHER):
        await take(claims, key, "a")
    task = await waiting(claims, KEY, OTHER)
    await ending(claims)
    await asyncio.wait_for(task, 5.0)
    assert claims.num_waiters == 0


async def test_the_claims_of_a_node_end_with_it_and_no_others() -> None:
    claims = alone()
    for key, owner in ((KEY, "node-1/request#1"), (OTHER, "node-1"), (THIRD, "node-10/request#1")):
        await take(claims, key, owner)
    assert await claims.end_of_node("node-1") == 2
    assert [await owner_of(claims, key) for key in (KEY, OTHER, THIRD)] == ["", "", "node-10/request#1"]


async def test_a_waiter_is_woken_when_a_claim_lapses_or_its_time_is_up() -> None:
    claims = alone(asyncio.get_running_loop().time)
    await take(claims, KEY, "a", 0.05)
    await asyncio.wait_for(wait(claims, KEY), 10.0)
    assert await owner_of(claims, KEY) == ""
    await take(claims, KEY, "a")
    await asyncio.wait_for(wait(claims, KEY, timeout_s=0.02), 10.0)
    assert await owner_of(claims, KEY) == "a"


async def test_news_that_comes_before_the_wait_is_not_missed() -> None:
    claims = alone()
    await take(claims, KEY, "a")
    with claims.listening([KEY]) as news:
        answers = [ClaimAnswer(lease=lease) for lease in await claims.holders([KEY])]
        await claims.release([KEY], "a")
        await asyncio.wait_for(claims.wait(news, answers, 60.0), 5.0)


async def test_a_cancelled_waiter_leaves_nothing() -> None:
    claims = alone()
    await take(claims, KEY, "a")
    task = await waiting(claims, KEY, KEY)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert claims.num_waiters == 0


async def test_closing_ends_every_wait_for_good() -> None:
    claims = alone()
    await take(claims, KEY, "a")
    task = await waiting(claims, KEY)
    claims.close()
    for each in (task, wait(claims, KEY)):
        with pytest.raises(Unavailable):
            await asyncio.wait_for(each, 5.0)
    assert claims.num_waiters == 0


# Over a backend that stores share


@pytest.fixture
def shared() -> FakeShared:
    return FakeShared(HandClock())


def sharing(shared: FakeShared) -> tuple[Claims, FakeBackend]:
    backend = FakeBackend(shared)
    return Claims(backend, EmbeddedBackend(Catalog(), shared.clock, shared.clock)), backend


async def test_stores_that_share_grant_each_claim_once_and_wake_each_others_waiters(shared: FakeShared) -> None:
    (here, _), (there, _) = sharing(shared), sharing(shared)
    await take(here, KEY, "a")
    assert (await take(there, KEY, "b")).lease == ClaimLease("a", 60.0)
    assert (here.num_live(), there.num_live()) == (1, 0), "each counts what it granted"
    task = await waiting(there, KEY)
    await here.release([KEY], "a")
    await asyncio.wait_for(task, 5.0)
    assert (await take(there, KEY, "b")).lease == ClaimLease("b", 60.0)


async def test_while_the_backend_is_away_a_store_decides_alone_on_top_of_what_it_granted(shared: FakeShared) -> None:
    claims, backend = sharing(shared)
    await take(claims, KEY, "a")
    backend.reachable = False
    assert (await take(claims, KEY, "b")).lease == ClaimLease("a", 60.0)
    assert (await take(claims, OTHER, "b")).lease == ClaimLease("b", 60.0)
    assert await owner_of(claims, OTHER) == "b"
    assert await claims.release([OTHER], "b") == 1


async def test_what_was_granted_meanwhile_is_told_when_the_backend_is_back(shared: FakeShared) -> None:
    (claims, backend), (there, _) = sharing(shared), sharing(shared)
    backend.reachable = False
    for key in (KEY, OTHER):
        await take(claims, key, "a")
    await take(there, OTHER, "b")
    backend.reachable = True
    await claims.say_again()
    assert [await owner_of(there, key) for key in (KEY, OTHER)] == ["a", "b"], "what another granted stands"


async def test_what_is_stored_while_the_backend_is_away_ends_the_claim_here(shared: FakeShared) -> None:
    claims, backend = sharing(shared)
    await take(claims, KEY, "a")
    backend.reachable = False
    await claims.stored([KEY], is_told=False)
    assert await owner_of(claims, KEY) == ""


async def test_a_waiter_looks_again_where_news_can_be_lost(shared: FakeShared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spolia_kvstore.claims.LOOK_AGAIN_S", 0.02)
    claims, _ = sharing(shared)
    await take(claims, KEY, "a")
    shared.claims.clear()  # ended elsewhere, and the news was lost
    await asyncio.wait_for(wait(claims, KEY), 5.0)
