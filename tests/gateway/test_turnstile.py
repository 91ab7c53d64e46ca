"""Requests that come at once, one after the other."""

from __future__ import annotations

import asyncio

import pytest

from spolia_gateway.turnstile import Turnstile


async def test_the_first_of_many_is_sent_on_before_the_last_is_read() -> None:
    turnstile, said = Turnstile(), []

    async def send_on(number: int) -> None:
        said.append(("sent", number))

    async def take_in(number: int) -> None:
        await turnstile.through()
        said.append(("read", number))
        await asyncio.create_task(send_on(number))

    await asyncio.gather(*(take_in(number) for number in range(8)))
    assert [number for what, number in said if what == "read"] == list(range(8))
    for number in range(6):
        assert said.index(("sent", number)) < said.index(("read", number + 2))


async def test_who_comes_alone_does_not_wait() -> None:
    turnstile = Turnstile()
    for _ in range(3):
        with pytest.raises(StopIteration):  # ended without a wait
            turnstile.through().send(None)
        await asyncio.sleep(0)


async def test_one_who_goes_keeps_nobody_waiting() -> None:
    turnstile = Turnstile()
    tasks = [asyncio.create_task(turnstile.through()) for _ in range(5)]
    await asyncio.sleep(0)
    for gone in tasks[1:4]:
        gone.cancel()
    await asyncio.wait_for(tasks[4], 5)
    await asyncio.wait_for(turnstile.through(), 5)
