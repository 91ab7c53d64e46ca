"""Places and arrivals: first come, first served, and nobody waits for one who waits for it."""

from __future__ import annotations

import asyncio

import pytest

from spolia_core.errors import Busy, DeadlineExceeded
from spolia_decode.admission import Admission
from spolia_decode.arrivals import Arrivals
from spolia_node.deadline import Deadline


def soon() -> Deadline:
    return Deadline.after(60)


async def test_places_are_given_in_order_and_come_back() -> None:
    admission, order = Admission(max_running=2, max_waiting=10), []

    async def one(number: int) -> None:
        async with admission.place(soon()):
            assert admission.num_running <= 2
            order.append(number)
            await asyncio.sleep(0)

    await asyncio.gather(*(one(number) for number in range(8)))
    assert order == list(range(8))
    assert (admission.num_running, admission.num_waiting) == (0, 0)


async def test_a_place_that_is_not_had_in_time_or_cancelled_is_not_held() -> None:
    admission = Admission(max_running=1, max_waiting=1)
    async with admission.place(soon()):
        with pytest.raises(DeadlineExceeded):
            async with admission.place(Deadline.after(0.01)):
                raise AssertionError("there was no place")
        waiting = asyncio.ensure_future(admission.place(soon()).__aenter__())
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            async with admission.place(soon()):
                raise AssertionError("one waits already")
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    async with admission.place(soon()):
        assert (admission.num_running, admission.num_waiting) == (1, 0)


async def test_tokens_are_queued_until_their_request_decodes_or_ends() -> None:
    admission = Admission(max_running=1, max_waiting=3)
    async with admission.place(soon(), 100) as decodes:
        assert admission.queued_tokens == 100, "it is being prepared"
        with pytest.raises(DeadlineExceeded):
            async with admission.place(Deadline.after(0.01), 7):
                raise AssertionError("there was no place")
        waiting = asyncio.ensure_future(admission.place(soon(), 20).__aenter__())
        await asyncio.sleep(0)
        assert admission.queued_tokens == 120
        decodes()
        decodes()
        assert admission.queued_tokens == 20
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert admission.queued_tokens == 0
    with pytest.raises(ValueError, match="failed"):
        async with admission.place(soon(), 5):
            raise ValueError("failed")
    assert admission.queued_tokens == 0


async def test_each_chunk_is_brought_by_one_and_waited_for_by_the_rest() -> None:
    arrivals, brought, here = Arrivals(), [], set()

    async def one(wanted: list[bytes]) -> None:
        while missing := [chunk_id for chunk_id in wanted if chunk_id not in here]:
            for chunk_id in arrivals.begin(missing):
                await asyncio.sleep(0)
                brought.append(chunk_id)
                here.add(chunk_id)
                arrivals.end(chunk_id)
            await arrivals.wait(missing)

    # Each wants what another brings, in every order.
    async with asyncio.timeout(10):
        await asyncio.gather(one([b"a", b"b"]), one([b"b", b"a"]), one([b"c", b"a"]), one([b"b", b"c"]))
    assert sorted(brought) == [b"a", b"b", b"c"]


async def test_when_the_bringer_fails_another_takes_over() -> None:
    arrivals = Arrivals()
    assert arrivals.begin([b"a"]) == {b"a"}
    assert arrivals.begin([b"a", b"b"]) == {b"b"}
    waiting = asyncio.ensure_future(arrivals.wait([b"a"]))
    await asyncio.sleep(0)
    assert not waiting.done()
    arrivals.end(b"a")
    await waiting
    assert arrivals.begin([b"a"]) == {b"a"}
