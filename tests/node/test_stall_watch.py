"""A limit on each of many waits. Time jumps: nothing here is late but what is to be."""

from __future__ import annotations

import asyncio
from contextlib import closing

import pytest
from jumping_clock import run_jumping

from spolia_node.stall_watch import StallWatch


def test_waits_within_the_limit_pass_however_many_they_are() -> None:
    async def waits() -> None:
        with closing(StallWatch(0.2)) as watch:
            for _ in range(8):  # longer than the limit, together
                with watch:
                    await asyncio.sleep(0.19)
            await asyncio.sleep(1.0)  # outside a block nothing is limited

    run_jumping(waits())


def test_a_wait_that_lasts_longer_ends_with_timeout_and_not_before() -> None:
    async def waits() -> None:
        loop = asyncio.get_running_loop()
        with closing(StallWatch(0.2)) as watch:
            with watch:
                await asyncio.sleep(0.15)
            began = loop.time()
            with pytest.raises(TimeoutError), watch:
                await asyncio.sleep(5)
            assert 0.2 <= loop.time() - began < 0.201
        _is_not_cancelled()

    run_jumping(waits())


def test_waits_after_one_that_was_late_have_the_limit_too() -> None:
    async def waits() -> None:
        loop = asyncio.get_running_loop()
        with closing(StallWatch(0.1)) as watch:
            for _ in range(3):
                began = loop.time()
                with pytest.raises(TimeoutError), watch:
                    await asyncio.sleep(5)
                assert 0.1 <= loop.time() - began < 0.201

    run_jumping(waits())


def test_a_wait_that_is_slow_to_end_is_cancelled_once() -> None:
    ended: list[bool] = []

    async def ends_slowly() -> None:
        try:
            await asyncio.sleep(5)
        finally:
            await asyncio.sleep(0.2)  # longer than the limit, once more
            ended.append(True)

    async def waits() -> None:
        with closing(StallWatch(0.05)) as watch, pytest.raises(TimeoutError), watch:
            await ends_slowly()
        _is_not_cancelled()

    run_jumping(waits())
    assert ended == [True]


def test_a_cancel_from_elsewhere_stays_one() -> None:
    async def waits() -> None:
        with closing(StallWatch(5)) as watch, watch:
            await asyncio.sleep(10)

    async def cancels() -> None:
        task = asyncio.create_task(waits())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run_jumping(cancels())


def test_a_cancel_from_elsewhere_goes_before_the_limits_own() -> None:
    async def waits() -> None:
        with closing(StallWatch(0.05)) as watch, watch:
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                asyncio.current_task().cancel()  # type: ignore[union-attr]  # as if it had come at the same time
                raise

    with pytest.raises(asyncio.CancelledError):
        run_jumping(waits())


def test_nothing_is_left_of_a_closed_watch() -> None:
    async def waits() -> None:
        with closing(StallWatch(0.05)) as watch, watch:
            pass
        await asyncio.sleep(0.1)

    run_jumping(waits())


def _is_not_cancelled() -> None:
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
