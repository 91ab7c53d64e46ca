"""A limit on each of many waits."""

from __future__ import annotations

import asyncio
from contextlib import closing

import pytest

from spolia_node.stall_watch import StallWatch


async def test_waits_within_the_limit_pass_however_many_they_are() -> None:
    with closing(StallWatch(0.2)) as watch:
        for _ in range(8):  # longer than the limit, together
            with watch:
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.25)  # outside a block nothing is limited


async def test_a_wait_that_lasts_longer_ends_with_timeout_and_not_before() -> None:
    loop = asyncio.get_running_loop()
    with closing(StallWatch(0.2)) as watch:
        with watch:
            await asyncio.sleep(0.15)
        began = loop.time()
        with pytest.raises(TimeoutError), watch:
            await asyncio.sleep(5)
        assert 0.2 <= loop.time() - began < 2
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_waits_after_one_that_was_late_have_the_limit_too() -> None:
    loop = asyncio.get_running_loop()
    with closing(StallWatch(0.1)) as watch:
        for _ in range(3):
            began = loop.time()
            with pytest.raises(TimeoutError), watch:
                await asyncio.sleep(5)
            assert 0.1 <= loop.time() - began < 2


async def test_a_wait_that_is_slow_to_end_is_cancelled_once() -> None:
    async def ends_slowly() -> None:
        try:
            await asyncio.sleep(5)
        finally:
            await asyncio.sleep(0.2)  # longer than the limit, once more
            ended.set()

    ended = asyncio.Event()
    with closing(StallWatch(0.05)) as watch, pytest.raises(TimeoutError), watch:
        await ends_slowly()
    assert ended.is_set()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_cancel_from_elsewhere_stays_one() -> None:
    async def waits() -> None:
        with closing(StallWatch(5)) as watch, watch:
            await asyncio.sleep(10)

    task = asyncio.create_task(waits())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancel_from_elsewhere_goes_before_the_limits_own() -> None:
    async def waits() -> None:
        with closing(StallWatch(0.05)) as watch, watch:
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                asyncio.current_task().cancel()  # type: ignore[union-attr]  # as if it had come at the same time
                raise

    task = asyncio.create_task(waits())
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_nothing_is_left_of_a_closed_watch() -> None:
    with closing(StallWatch(0.05)) as watch, watch:
        pass
    await asyncio.sleep(0.1)
