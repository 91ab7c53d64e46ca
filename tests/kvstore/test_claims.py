"""Single flight: one owner at a time, and everyone who waits is woken."""

import asyncio
import time

import pytest
from kvstore_worlds import HandClock, make_record

from spolia_core.errors import Unavailable
from spolia_kvstore.claims import SWEEP_EVERY_S, Claims

KEY, OTHER = make_record(1, 1).key, make_record(2, 1).key


def test_a_claim_is_held_by_the_first_until_it_lapses() -> None:
    clock = HandClock()
    claims = Claims(clock)
    assert claims.take(KEY, "a", 10.0).owner == "a"
    assert claims.take(KEY, "b", 10.0).owner == "a"
    clock.now += 10.0
    assert claims.holder(KEY) is None
    assert claims.take(KEY, "b", 10.0).owner == "b"


def test_the_owner_renews() -> None:
    clock = HandClock()
    claims = Claims(clock)
    claims.take(KEY, "a", 10.0)
    clock.now += 9.0
    assert claims.take(KEY, "a", 10.0).expires_at == clock.now + 10.0
    assert claims.num_live() == 1


def test_only_the_owner_releases() -> None:
    claims = Claims(HandClock())
    claims.take(KEY, "a", 10.0)
    assert not claims.release(KEY, "b")
    assert claims.holder(KEY) is not None
    assert claims.release(KEY, "a")
    assert not claims.release(KEY, "a")


def test_lapsed_claims_nobody_asks_about_are_forgotten() -> None:
    clock = HandClock()
    claims = Claims(clock)
    claims.take(KEY, "a", 1.0)
    clock.now += SWEEP_EVERY_S + 1.0
    claims.take(OTHER, "a", 1.0)
    assert set(claims._claims) == {OTHER}


@pytest.mark.parametrize("ending", ["release", "end"])
async def test_a_waiter_is_woken_when_any_of_its_claims_ends(ending: str) -> None:
    claims = Claims()
    for key in (KEY, OTHER):
        claims.take(key, "a", 60.0)
    waiting = asyncio.create_task(claims.wait_change([KEY, OTHER], time.monotonic() + 60.0))
    await asyncio.sleep(0)  # the task runs to its wait
    assert claims.num_waiters
    if ending == "release":
        claims.release(OTHER, "a")
    else:
        claims.end(OTHER)
    await asyncio.wait_for(waiting, 5.0)
    assert claims.num_waiters == 0


async def test_the_claims_of_a_node_end_with_it_and_wake_who_waits() -> None:
    claims = Claims()
    third = make_record(3, 1).key
    for key, owner in ((KEY, "node-1/request#1"), (OTHER, "node-1"), (third, "node-10/request#1")):
        claims.take(key, owner, 60.0)
    waiting = asyncio.create_task(claims.wait_change([KEY], time.monotonic() + 60.0))
    await asyncio.sleep(0)  # the task runs to its wait
    assert claims.num_waiters
    assert claims.end_of_node("node-1") == 2
    await asyncio.wait_for(waiting, 5.0)
    assert [claims.holder(key) is not None for key in (KEY, OTHER, third)] == [False, False, True]


async def test_a_waiter_is_woken_when_a_claim_lapses() -> None:
    claims = Claims()
    claims.take(KEY, "a", 0.05)
    await asyncio.wait_for(claims.wait_change([KEY], time.monotonic() + 60.0), 10.0)
    assert claims.holder(KEY) is None


async def test_a_waiter_returns_when_its_time_is_up() -> None:
    claims = Claims()
    claims.take(KEY, "a", 60.0)
    await asyncio.wait_for(claims.wait_change([KEY], time.monotonic() + 0.02), 10.0)
    assert claims.holder(KEY) is not None


async def test_a_cancelled_waiter_leaves_nothing() -> None:
    claims = Claims()
    claims.take(KEY, "a", 60.0)
    waiting = asyncio.create_task(claims.wait_change([KEY, KEY], time.monotonic() + 60.0))
    await asyncio.sleep(0)  # the task runs to its wait
    assert claims.num_waiters
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert claims.num_waiters == 0


async def test_nobody_waits_for_what_is_free() -> None:
    claims = Claims()
    await asyncio.wait_for(claims.wait_change([KEY], time.monotonic() + 60.0), 5.0)


async def test_closing_ends_every_wait_for_good() -> None:
    claims = Claims()
    claims.take(KEY, "a", 60.0)
    waiting = asyncio.create_task(claims.wait_change([KEY], time.monotonic() + 60.0))
    await asyncio.sleep(0)  # the task runs to its wait
    assert claims.num_waiters
    claims.close()
    for wait in (waiting, claims.wait_change([KEY], time.monotonic() + 60.0)):
        with pytest.raises(Unavailable):
            await asyncio.wait_for(wait, 5.0)
    assert claims.num_waiters == 0
