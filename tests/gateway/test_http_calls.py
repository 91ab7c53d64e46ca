"""Work for HTTP clients: it ends with its client, and with its node, and then nothing is left of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from gateway_fakes import WAIT_S
from starlette.types import Message

from spolia_core.errors import Cancelled, Unavailable
from spolia_gateway.http.calls import Calls

LEAVING = Unavailable("this node is shutting down")


class Client:
    """Stays until `go`."""

    def __init__(self) -> None:
        self._gone = asyncio.Event()

    def go(self) -> None:
        self._gone.set()

    async def receive(self) -> Message:
        await self._gone.wait()
        return {"type": "http.disconnect"}


class Work:
    """Waits for ever, and takes a moment to end."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.ended = False

    async def run(self) -> None:
        self.began.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.ended = True


async def calling(calls: Calls, client: Client, work: Work) -> asyncio.Task[Any]:
    """A call under way. What it ends with it tells after one more wait, which must not be cut short too."""

    async def call() -> Any:
        try:
            return await calls.run(client.receive, work.run())
        except (Cancelled, Unavailable) as error:
            await asyncio.sleep(0)
            return error

    task = asyncio.ensure_future(call())
    async with asyncio.timeout(WAIT_S):
        await work.began.wait()
    return task


async def test_a_call_gives_what_its_work_gives_and_what_that_raises() -> None:
    calls = Calls()

    async def fails() -> None:
        raise KeyError("x")

    assert await calls.run(Client().receive, asyncio.sleep(0, "done")) == "done"
    with pytest.raises(KeyError):
        await calls.run(Client().receive, fails())
    assert calls.num_running == 0
    async with asyncio.timeout(WAIT_S):
        await calls.wait_idle()


async def test_a_client_that_goes_ends_its_work_first() -> None:
    calls, client, work = Calls(), Client(), Work()
    task = await calling(calls, client, work)
    client.go()
    error = await asyncio.wait_for(task, WAIT_S)
    assert isinstance(error, Cancelled)
    assert work.ended
    assert (calls.num_running, task.cancelling()) == (0, 0)


async def test_a_node_that_ends_tells_calls_why_and_begins_none() -> None:
    calls, client, work = Calls(), Client(), Work()
    task = await calling(calls, client, work)
    assert calls.end(LEAVING) == 1
    client.go()  # the first reason is the one that is told
    assert await asyncio.wait_for(task, WAIT_S) is LEAVING
    assert work.ended
    late = Work()
    with pytest.raises(Unavailable):
        await calls.run(Client().receive, late.run())
    assert not late.began.is_set()
    assert calls.num_running == 0


async def test_a_cancel_from_outside_passes_also_beside_a_client_that_goes() -> None:
    for goes in (False, True):
        calls, client, work = Calls(), Client(), Work()
        task = await calling(calls, client, work)
        if goes:
            client.go()
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, WAIT_S)
        assert work.ended
        assert calls.num_running == 0


async def test_a_client_that_goes_when_its_work_is_done_cuts_nothing_short() -> None:
    calls, client = Calls(), Client()

    async def work() -> str:
        await asyncio.sleep(0)
        client.go()
        return "done"

    async def call() -> str:
        said = await calls.run(client.receive, work())
        for _ in range(3):
            await asyncio.sleep(0)
        return said

    assert await asyncio.wait_for(asyncio.ensure_future(call()), WAIT_S) == "done"
