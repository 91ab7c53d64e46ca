"""Calls that wait for the shared index while an object is stored here: they see it, and the index goes on naming it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest
from fake_backend import FakeBackend, FakeShared
from kvstore_worlds import key_of, make_chunk
from site_worlds import Site, held_by, replicas_of
from tier_worlds import ANYONE

from spolia_kvstore.objects import Tier
from spolia_kvstore.store import ClaimState

CHUNK = make_chunk(1)
KEY = key_of(CHUNK)
GRACE_S = 10.0
T = TypeVar("T")
BEFORE_AND_AFTER = pytest.mark.parametrize("after", [False, True], ids=["before it decides", "after it decided"])


class Held:
    """A call to the backend that stands still, from `has_begun` until `may_go_on`."""

    def __init__(self) -> None:
        self.has_begun = asyncio.Event()
        self.may_go_on = asyncio.Event()

    async def stand_still(self) -> None:
        self.has_begun.set()
        async with asyncio.timeout(GRACE_S):
            await self.may_go_on.wait()


@contextmanager
def holding(backend: FakeBackend, method: str, *, after: bool = False) -> Iterator[Held]:
    """Holds the next call of this method before the backend decides; or, `after`, its answer on the way back."""
    held, call = Held(), getattr(backend, method)

    async def once(*args: object) -> object:
        setattr(backend, method, call)
        if after:
            answer = await call(*args)
            await held.stand_still()
            return answer
        await held.stand_still()
        return await call(*args)

    setattr(backend, method, once)
    yield held
    assert held.has_begun.is_set()


async def crossed(held: Held, work: Awaitable[T], meanwhile: Callable[[], Awaitable[object]]) -> T:
    """What `work` returns, which stands still while `meanwhile` runs from its beginning to its end."""
    task = asyncio.ensure_future(work)
    async with asyncio.timeout(GRACE_S):
        await held.has_begun.wait()
    await meanwhile()
    held.may_go_on.set()
    return await task


@BEFORE_AND_AFTER
async def test_a_get_gives_what_is_stored_while_it_asks_who_else_has_it(
    shared: FakeShared, pair: tuple[Site, Site], after: bool
) -> None:
    here, _ = pair
    with holding(here.backend, "locate", after=after) as held:
        answers = await crossed(held, here.world.get(CHUNK), lambda: here.world.put(CHUNK))
    assert answers == [(Tier.RAM, CHUNK.data)]
    assert here.world.store.counters.hits[Tier.RAM] == 1
    assert not here.world.store.counters.misses


async def test_a_get_finds_what_moves_here_from_another_store(shared: FakeShared, pair: tuple[Site, Site]) -> None:
    """One of the two has it throughout, so no reader may be told that nobody has."""
    here, there = pair
    await there.world.put(CHUNK)

    async def move() -> None:
        await here.world.put(CHUNK, durable=True)
        there.world.drop_from_memory(KEY)
        await there.settled()

    with holding(here.backend, "locate") as held:
        answers = await crossed(held, here.world.get(CHUNK), move)
    assert answers == [(Tier.RAM, CHUNK.data)]
    assert replicas_of(shared) == held_by(here)


@pytest.mark.parametrize("method", ["locate", "claims"])
@BEFORE_AND_AFTER
async def test_a_lookup_says_what_is_stored_while_it_asks(pair: tuple[Site, Site], method: str, after: bool) -> None:
    here, _ = pair
    with holding(here.backend, method, after=after) as held:
        lookup = here.world.store.lookup([KEY], ANYONE)
        (entry,) = await crossed(held, lookup, lambda: here.world.put(CHUNK))
    assert (entry.miss, entry.tier) == (None, Tier.RAM)


async def test_the_index_names_throughout_what_a_reader_did_not_know_of(
    shared: FakeShared, pair: tuple[Site, Site]
) -> None:
    """Withdrawn and said again, others would miss it in between; where clocks differ, it may be taken for deleted."""
    here, _ = pair
    with holding(here.backend, "locate") as held:
        await crossed(held, here.world.get(CHUNK), lambda: here.world.put(CHUNK))
    await here.settled()
    assert not [each for each in shared.log if each.startswith("withdraw")]
    assert replicas_of(shared) == held_by(here)
    assert here.world.store.index.unsaid == set()


@BEFORE_AND_AFTER
async def test_nobody_is_to_compute_what_is_stored_while_it_is_claimed(
    shared: FakeShared, pair: tuple[Site, Site], after: bool
) -> None:
    here, _ = pair
    with holding(here.backend, "claim", after=after) as held:
        claim = here.world.store.claim([KEY], "me", 30.0, 0.0)
        (result,) = await crossed(held, claim, lambda: here.world.put(CHUNK))
    assert result.state is ClaimState.STORED
    assert not shared.claims
    assert here.world.store.claims.num_live() == 0
