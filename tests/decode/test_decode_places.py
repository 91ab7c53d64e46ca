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


async def test_each_sample_of_a_request_takes_a_place_and_gives_it_back_by_itself() -> None:
    admission = Admission(max_running=4, max_waiting=3)
    async with admission.place(soon(), num_places=3) as place:
        with place.another() as second, place.another():
            assert (admission.num_running, admission.num_free_places) == (1, 1)
            other = admission.place(soon(), num_places=2)
            waiting = asyncio.ensure_future(other.__aenter__())
            await asyncio.sleep(0)
            assert admission.num_waiting == 1, "one place is free, it wants two"
            second.leave()
            await asyncio.wait_for(waiting, 5)
            assert admission.num_free_places == 0
    async with admission.place(Deadline.after(0.01)):
        pass
    assert admission.num_free_places == 2, "the other request holds its two"
    await other.__aexit__(None, None, None)
    assert admission.num_free_places == 4


async def test_more_samples_than_places_run_alone() -> None:
    admission = Admission(max_running=2, max_waiting=3)
    async with admission.place(soon(), num_places=5) as place:
        assert admission.num_free_places == -3
        with pytest.raises(DeadlineExceeded):
            async with admission.place(Deadline.after(0.01)):
                raise AssertionError("all places are taken")
        with place.another(), place.another(), place.another(), place.another():
            assert admission.num_free_places == -3
    assert admission.num_free_places == 2


async def test_tokens_are_queued_until_their_request_decodes_or_ends() -> None:
    admission = Admission(max_running=1, max_waiting=3)
    async with admission.place(soon(), 100) as place:
        assert admission.queued_tokens == 100, "it is being prepared"
        with pytest.raises(DeadlineExceeded):
            async with admission.place(Deadline.after(0.01), 7):
                raise AssertionError("there was no place")
        waiting = asyncio.ensure_future(admission.place(soon(), 20).__aenter__())
        await asyncio.sleep(0)
        assert admission.queued_tokens == 120
        place.decodes()
        place.decodes()
        assert admission.queued_tokens == 20
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert admission.queued_tokens == 0
    with pytest.raises(ValueError, match="failed"):
        async with admission.place(soon(), 5):
            raise ValueError("failed")
    assert admission.queued_tokens == 0


async def test_a_place_is_had_when_its_blocks_are_there_and_none_passes_an_earlier_one() -> None:
    blocks = 10
    admission, order = Admission(max_running=8, max_waiting=8, available_blocks=lambda: blocks), []

    async def one(name: str, num_blocks: int, end: asyncio.Event) -> None:
        async with admission.place(soon(), num_blocks=num_blocks):
            order.append(name)
            await end.wait()

    first, others = asyncio.Event(), asyncio.Event()
    tasks = [asyncio.ensure_future(one("a", 6, first))]
    tasks += [asyncio.ensure_future(one(name, need, others)) for name, need in (("b", 5), ("c", 4), ("d", 1))]
    for _ in range(5):
        await asyncio.sleep(0)
    assert order == ["a"], "c and d would fit, but b came first"
    assert (admission.num_running, admission.num_waiting) == (1, 3)
    first.set()
    for _ in range(10):
        await asyncio.sleep(0)
    assert order == ["a", "b", "c", "d"]
    others.set()
    await asyncio.gather(*tasks)


async def test_what_was_promised_counts_until_it_decodes() -> None:
    blocks = 10
    admission = Admission(max_running=8, max_waiting=8, available_blocks=lambda: blocks)
    async with admission.place(soon(), num_blocks=6) as place:
        waiting = asyncio.ensure_future(admission.place(soon(), num_blocks=6).__aenter__())
        await asyncio.sleep(0)
        assert not waiting.done()
        blocks -= 4  # it takes less than it was promised
        place.decodes()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert waiting.done()


async def test_the_preempted_come_back_before_all_who_came_later_and_keep_their_place() -> None:
    blocks, order = 10, []
    admission = Admission(max_running=2, max_waiting=8, available_blocks=lambda: blocks)

    async def newcomer() -> None:
        async with admission.place(soon(), num_blocks=1):
            order.append("new")

    async with admission.place(soon(), num_blocks=1) as oldest, admission.place(soon(), num_blocks=1) as place:
        oldest.decodes()
        place.decodes()
        blocks = 0
        new = asyncio.ensure_future(newcomer())
        again = asyncio.ensure_future(place.wait_again(4, soon()))
        for _ in range(3):
            await asyncio.sleep(0)
        assert not again.done()
        assert admission.num_running == 2
        blocks = 4
        admission.look_again()
        await again
        order.append("again")
    await new
    assert order == ["again", "new"]


async def test_where_nobody_runs_the_first_is_admitted_whatever_it_needs() -> None:
    admission = Admission(max_running=2, max_waiting=2, available_blocks=lambda: 0)
    async with admission.place(soon(), num_blocks=100):
        with pytest.raises(DeadlineExceeded):
            async with admission.place(Deadline.after(0.01), num_blocks=1):
                raise AssertionError("there was no room")


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
