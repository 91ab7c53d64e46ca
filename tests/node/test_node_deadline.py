"""Deadlines shrink, and say what ran out of time."""

from __future__ import annotations

import asyncio

import pytest

from spolia_core.errors import DeadlineExceeded
from spolia_node.deadline import Deadline


class Context:
    def __init__(self, left: float | None) -> None:
        self.left = left

    def time_remaining(self) -> float | None:
        return self.left


def test_remaining_shrinks_and_is_never_negative():
    deadline = Deadline.after(60)
    first = deadline.remaining()
    assert 0 < deadline.remaining() <= first <= 60
    assert Deadline.after(-5).remaining() == 0
    assert Deadline.after(-5).expired
    assert not deadline.expired


def test_the_callers_deadline_counts_and_the_default_only_without_one():
    assert 99 < Deadline.of(Context(100.0), default_s=1.0).remaining() <= 100
    assert Deadline.of(Context(0.0), default_s=1.0).expired
    assert 0 < Deadline.of(Context(None), default_s=1.0).remaining() <= 1


def test_a_share_is_nearer_and_never_past_the_whole():
    whole = Deadline.after(100)
    assert whole.share(0.25).at < whole.at
    assert 24 < whole.share(0.25).remaining() <= 25


def test_check_raises_once_time_is_up_and_names_the_work():
    Deadline.after(60).check("the fetch")
    with pytest.raises(DeadlineExceeded, match="the fetch ran out of time"):
        Deadline.after(0).check("the fetch")


async def test_wait_gives_the_result_in_time():
    assert await Deadline.after(60).wait(asyncio.sleep(0, "done"), "the work") == "done"


async def test_wait_cancels_what_is_late():
    cancelled = asyncio.Event()

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(DeadlineExceeded, match="the work ran out of time"):
        await Deadline.after(0.01).wait(endless(), "the work")
    assert cancelled.is_set()


async def test_a_timeout_of_the_work_itself_keeps_its_name():
    async def own_timeout() -> None:
        raise TimeoutError("the disk")

    with pytest.raises(TimeoutError, match="the disk"):
        await Deadline.after(60).wait(own_timeout(), "the work")
