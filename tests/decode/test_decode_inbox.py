"""The way of tokens from the engine's thread to their readers."""

from __future__ import annotations

import asyncio
import threading

import pytest

from spolia_core.errors import Busy, DeadlineExceeded, InternalError, Unavailable
from spolia_decode.inbox import MAX_TOGETHER, Inbox, Outbox, Preempted
from spolia_engine.generation import Delta
from spolia_node.deadline import Deadline


def _delta(index: int, text: str = "") -> Delta:
    return Delta(index, (index + 100,), text, 0)


async def test_a_step_wakes_the_loop_once_for_all_its_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, wakes = asyncio.get_running_loop(), []
    call_soon = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: (wakes.append(args), call_soon(*args))[1])
    inboxes, outbox = [Inbox() for _ in range(32)], Outbox()
    for index, inbox in enumerate(inboxes):
        outbox.post(inbox, _delta(index))
    outbox.deliver()
    outbox.deliver()
    assert len(wakes) == 1
    assert [await inbox.take() for inbox in inboxes] == [_delta(index) for index in range(32)]


async def test_a_reader_who_is_behind_gets_all_that_waits_at_once_and_nothing_twice() -> None:
    inbox = Inbox()
    inbox.put(_delta(0, "a"))
    first = asyncio.ensure_future(inbox.take())
    assert await first == _delta(0, "a")
    for index, text in enumerate("bcd", start=1):
        inbox.put(_delta(index, text))
    inbox.put(None)
    assert await inbox.take() == Delta(1, (101, 102, 103), "bcd", 0)
    assert await inbox.take() is None


async def test_what_a_reader_gets_at_once_is_bounded_and_the_rest_comes_next() -> None:
    inbox = Inbox()
    for index in range(2 * MAX_TOGETHER + 3):
        inbox.put(_delta(index))
    inbox.put(None)
    taken = [await inbox.take() for _ in range(4)]
    assert [delta and len(delta.token_ids) for delta in taken] == [MAX_TOGETHER, MAX_TOGETHER, 3, None]


@pytest.mark.parametrize("why", [Preempted(), Busy("no room")])
async def test_what_came_before_the_end_is_taken_before_it(why: Exception) -> None:
    inbox = Inbox()
    inbox.put(_delta(0))
    inbox.put(why)  # type: ignore[arg-type]  # any error ends it, whatever the signature names
    assert await inbox.take() == _delta(0)
    with pytest.raises(type(why)):
        await inbox.take()


async def test_a_reader_is_told_when_time_is_up() -> None:
    inbox = Inbox()
    inbox.open(Deadline.after(0.05))
    with pytest.raises(DeadlineExceeded, match="decoding"):
        await asyncio.wait_for(inbox.take(), 5)
    inbox.close()


async def test_a_closed_inbox_has_no_alarm_left() -> None:
    inbox = Inbox()
    inbox.open(Deadline.after(0.05))
    inbox.close()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(inbox.take(), 0.2)


async def test_every_token_comes_once_and_in_order_from_another_thread() -> None:
    num_tokens = 2000
    inbox, outbox = Inbox(), Outbox()

    def engine() -> None:
        for index in range(num_tokens):
            outbox.post(inbox, _delta(index))
            if index % 3 == 0:
                outbox.deliver()
        outbox.post(inbox, None)
        outbox.deliver()

    thread = threading.Thread(target=engine)
    thread.start()
    ids: list[int] = []
    while (delta := await asyncio.wait_for(inbox.take(), 10)) is not None:
        assert delta.token_index == len(ids)
        ids += delta.token_ids
    thread.join()
    assert ids == [index + 100 for index in range(num_tokens)]


def test_news_for_a_loop_that_has_ended_is_dropped() -> None:
    async def make() -> Inbox:
        return Inbox()

    inbox, outbox = asyncio.run(make()), Outbox()
    outbox.post(inbox, _delta(0))
    outbox.deliver()


async def test_what_is_poured_comes_in_order_and_the_reader_gets_the_end() -> None:
    inbox, poured = Inbox(), list[int]()
    inbox.put(_delta(0))
    inbox.put(_delta(1))
    inbox.pour(lambda delta: poured.append(delta.token_index))
    inbox.put(_delta(2))
    reading = asyncio.ensure_future(inbox.take())
    await asyncio.sleep(0)
    inbox.put(_delta(3))
    await asyncio.sleep(0)
    assert not reading.done(), "tokens wake nobody"
    inbox.put(None)
    assert await reading is None
    assert poured == [0, 1, 2, 3]


@pytest.mark.parametrize(("raised", "met"), [(Unavailable("gone"), Unavailable), (ValueError("bug"), InternalError)])
async def test_what_a_sink_raises_is_its_readers_and_no_other_inboxs(raised: Exception, met: type[Exception]) -> None:
    inbox, other, outbox = Inbox(), Inbox(), Outbox()

    def breaks(delta: Delta) -> None:
        raise raised

    inbox.pour(breaks)
    outbox.post(inbox, _delta(0))
    outbox.post(inbox, _delta(1))
    outbox.post(other, _delta(7))
    outbox.deliver()
    with pytest.raises(met):
        await inbox.take()
    taken = await other.take()
    assert taken is not None
    assert taken.token_index == 7


async def test_nothing_is_poured_after_the_time_is_up_or_the_reader_gone() -> None:
    late, gone, poured = Inbox(), Inbox(), list[int]()
    for inbox in (late, gone):
        inbox.pour(lambda delta: poured.append(delta.token_index))
    late.open(Deadline.after(0.0))
    with pytest.raises(DeadlineExceeded):
        await late.take()
    late.put(_delta(1))
    gone.close()
    gone.put(_delta(2))
    assert poured == []
