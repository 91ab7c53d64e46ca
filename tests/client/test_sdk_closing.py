"""Closing a client ends its calls as `Cancelled`, and leaves it unable to make more."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fake_gateway import PATIENCE_S, FakeGateway, Hang, delta

from spolia import AsyncClient, Cancelled, Client, InvalidRequest, Unavailable
from spolia.lifetime import Lifetime

CALLS: list[tuple[Any, ...]] = [
    ("generate", "Hi"),
    ("warm", "Hi"),
    ("forget", "Hi"),
    ("tokenize", "Hi"),
    ("models",),
    ("cluster",),
]


@pytest.fixture
def begun(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when the gateway, which never answers, has met a call."""
    gateway.hang = True
    event = threading.Event()
    wait = gateway._wait_until_caller_has_gone

    def begin() -> None:
        event.set()
        wait()

    monkeypatch.setattr(gateway, "_wait_until_caller_has_gone", begin)
    return event


@pytest.mark.parametrize(("method", "arguments"), [(call[0], call[1:]) for call in CALLS])
def test_a_call_in_another_thread_is_cancelled(
    method: str, arguments: Any, gateway: FakeGateway, begun: threading.Event
) -> None:
    client = Client(gateway.address)
    with ThreadPoolExecutor() as threads:
        calling = threads.submit(getattr(client, method), *arguments)
        assert begun.wait(PATIENCE_S)
        client.close()
        with pytest.raises(Cancelled, match="client was closed"):
            calling.result(PATIENCE_S)
    assert gateway.caller_gone.wait(PATIENCE_S)


def test_an_answer_that_has_begun_is_cancelled_too(gateway: FakeGateway) -> None:
    gateway.script = [delta("a", [5], 0, 0), Hang()]
    first = threading.Event()

    def read(client: Client) -> None:
        for _ in client.stream("Hi"):
            first.set()

    client = Client(gateway.address)
    with ThreadPoolExecutor() as threads:
        reading = threads.submit(read, client)
        assert first.wait(PATIENCE_S)
        client.close()
        with pytest.raises(Cancelled, match="client was closed"):
            reading.result(PATIENCE_S)


@pytest.mark.parametrize(("method", "arguments"), [(call[0], call[1:]) for call in CALLS])
async def test_an_asyncio_call_is_cancelled_with_an_error_and_its_task_is_not(
    method: str, arguments: Any, gateway: FakeGateway, begun: threading.Event
) -> None:
    client = AsyncClient(gateway.address)
    calling = asyncio.create_task(getattr(client, method)(*arguments))
    assert await asyncio.to_thread(begun.wait, PATIENCE_S)
    await client.close()
    with pytest.raises(Cancelled, match="client was closed"):
        await asyncio.wait_for(calling, PATIENCE_S)
    assert not calling.cancelled()


async def test_an_asyncio_answer_that_has_begun_is_cancelled_too(gateway: FakeGateway) -> None:
    gateway.script = [delta("a", [5], 0, 0), Hang()]
    client = AsyncClient(gateway.address)
    deltas = aiter(client.stream("Hi"))
    await anext(deltas)
    reading = asyncio.ensure_future(anext(deltas))
    await asyncio.sleep(0)
    await client.close()
    with pytest.raises(Cancelled, match="client was closed"):
        await asyncio.wait_for(reading, PATIENCE_S)


async def test_a_task_that_is_cancelled_while_its_client_closes_stays_cancelled(
    gateway: FakeGateway, begun: threading.Event
) -> None:
    client = AsyncClient(gateway.address)
    calling = asyncio.create_task(client.generate("Hi"))
    assert await asyncio.to_thread(begun.wait, PATIENCE_S)
    calling.cancel()
    await client.close()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert calling.cancelled()


@pytest.mark.parametrize(("method", "arguments"), [*((call[0], call[1:]) for call in CALLS), ("stream", ("Hi",))])
def test_a_closed_client_refuses_every_call(method: str, arguments: Any, gateway: FakeGateway) -> None:
    client = Client(gateway.address)
    client.close()
    client.close()
    with pytest.raises(InvalidRequest, match="the client is closed"):
        getattr(client, method)(*arguments)
    assert gateway.requests == []


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize(("method", "arguments"), [*((call[0], call[1:]) for call in CALLS), ("stream", ("Hi",))])
async def test_a_closed_asyncio_client_refuses_every_call(
    method: str, arguments: Any, used: bool, gateway: FakeGateway
) -> None:
    client = AsyncClient(gateway.address)
    if used:
        await client.models()
    await client.close()
    await client.close()
    with pytest.raises(InvalidRequest, match="the client is closed"):
        await getattr(client, method)(*arguments)
    assert len(gateway.requests) == used


def test_an_error_the_gateway_sent_before_is_what_it_was(gateway: FakeGateway) -> None:
    gateway.failure = Unavailable("draining")
    with Client(gateway.address, retry_s=0) as client:
        stream = client.stream("Hi")
        with pytest.raises(Unavailable, match="draining"):
            stream.result()
    with pytest.raises(Unavailable, match="draining"):
        stream.result()


def test_a_client_closed_just_as_a_call_begins_says_so_in_its_own_words() -> None:
    lifetime = Lifetime()

    def lose_the_race() -> None:
        lifetime.close()
        raise ValueError("Cannot invoke RPC on closed channel!")

    with pytest.raises(InvalidRequest, match="the client is closed"), lifetime.call():
        lose_the_race()
    with pytest.raises(ValueError, match="another"), Lifetime().call():
        raise ValueError("another")
