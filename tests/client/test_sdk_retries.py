"""What a client waits out while nodes are replaced, and what it does not."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import fake_gateway
import pytest
from fake_gateway import HELLO, FakeGateway, delta, finish

from spolia import AsyncClient, Busy, Cancelled, ChatMessage, Client, InvalidRequest, Unavailable
from spolia_bench.free_port import free_port

GONE = Unavailable("being replaced")
METHODS = [
    ("generate", ("Hi",)),
    ("warm", (["a text"],)),
    ("forget", (["a text"],)),
    ("tokenize", ("Hi",)),
    ("render_chat", ([ChatMessage("user", "Hi")],)),
    ("models", ()),
    ("cluster", ()),
]


class Recovering(FakeGateway):
    """Fails some calls, then serves."""

    num_failures = 2

    def _begin(self, request: Any, context: Any) -> None:
        self.failure = GONE if len(self.requests) < self.num_failures else None
        super()._begin(request, context)

    def RenderChat(self, request: Any, context: Any) -> Any:
        self._begin(request, context)  # which the other calls do by themselves
        return super().RenderChat(request, context)


@pytest.fixture(params=["blocking", "asyncio"])
def ask(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`ask(address, retry_s, "generate", …)` on a fresh client of either kind."""

    def blocking(address: str, retry_s: float, method: str, *args: Any) -> Any:
        with Client(address, retry_s=retry_s) as client:
            return getattr(client, method)(*args)

    def on_a_loop(address: str, retry_s: float, method: str, *args: Any) -> Any:
        async def run() -> Any:
            async with AsyncClient(address, retry_s=retry_s) as client:
                return await getattr(client, method)(*args)

        return asyncio.run(run())

    return blocking if request.param == "blocking" else on_a_loop


@pytest.mark.parametrize(("method", "arguments"), METHODS)
def test_every_call_waits_out_a_node_that_is_being_replaced(
    ask: Callable[..., Any], method: str, arguments: tuple[Any, ...]
) -> None:
    gateway = Recovering()
    server = fake_gateway.start(gateway)
    try:
        ask(gateway.address, 10.0, method, *arguments)
    finally:
        server.stop(grace=None).wait(fake_gateway.PATIENCE_S)
    assert len(gateway.requests) == Recovering.num_failures + 1
    assert all(request == gateway.requests[0] for request in gateway.requests), "the same request, under the same id"


def test_a_gateway_that_is_not_there_yet_is_waited_for(ask: Callable[..., Any]) -> None:
    gateway, port, servers = FakeGateway(), free_port(), []
    starting = threading.Timer(0.4, lambda: servers.append(fake_gateway.start(gateway, port)))
    starting.start()
    try:
        assert ask(f"127.0.0.1:{port}", 20.0, "generate", "Hi").text == "Héllo"
    finally:
        starting.join()
        servers[0].stop(grace=None).wait(fake_gateway.PATIENCE_S)


def test_patience_ends_and_the_last_failure_is_told(ask: Callable[..., Any], gateway: FakeGateway) -> None:
    gateway.failure = GONE
    began = time.monotonic()
    with pytest.raises(Unavailable, match="being replaced"):
        ask(gateway.address, 1.5, "generate", "Hi")
    assert time.monotonic() - began < 1.5 + 10
    assert 2 <= len(gateway.requests) <= 4


def test_what_has_begun_is_not_begun_again(ask: Callable[..., Any], gateway: FakeGateway) -> None:
    gateway.script = [HELLO[0], GONE]
    with pytest.raises(Unavailable):
        ask(gateway.address, 10.0, "generate", "Hi")
    assert len(gateway.requests) == 1


@pytest.mark.parametrize("error", [Busy("full", retry_after_ms=1), InvalidRequest("wrong")])
def test_only_a_node_that_is_away_is_waited_out(ask: Callable[..., Any], gateway: FakeGateway, error: Any) -> None:
    gateway.failure = error
    with pytest.raises(type(error)):
        ask(gateway.address, 10.0, "generate", "Hi")
    assert len(gateway.requests) == 1


def test_a_time_limit_bounds_the_waiting(gateway: FakeGateway) -> None:
    gateway.failure = GONE
    began = time.monotonic()
    with Client(gateway.address, retry_s=60) as client, pytest.raises(Unavailable):
        client.generate("Hi", timeout_s=2.0)
    assert time.monotonic() - began < 20


def test_a_stream_that_waits_can_be_cancelled(gateway: FakeGateway) -> None:
    gateway.failure = Unavailable("come back later", retry_after_ms=60_000)
    with Client(gateway.address, timeout_s=600, retry_s=500) as client:
        stream = client.stream("Hi")
        threading.Timer(0.3, stream.cancel).start()
        with pytest.raises(Cancelled):
            stream.result()


def test_a_cancel_that_comes_while_the_next_call_begins_ends_that_call(gateway: FakeGateway) -> None:
    gateway.failure = Unavailable("come back soon")
    with Client(gateway.address, retry_s=50) as client, client.stream("Hi") as stream:
        begin, begun = stream._call._begin, []  # type: ignore[attr-defined]  # the moment is inside it

        def begin_under_cancel() -> Any:
            gateway.failure = None
            stream.cancel()
            begun.append(begin())
            return begun[0]

        stream._call._begin = begin_under_cancel  # type: ignore[attr-defined]  # a private one is replaced
        with pytest.raises(Cancelled):
            stream.result()
        assert begun[0].cancelled()


async def test_an_async_stream_that_waits_can_be_cancelled(gateway: FakeGateway) -> None:
    gateway.failure = Unavailable("come back later", retry_after_ms=60_000)
    async with AsyncClient(gateway.address, timeout_s=600, retry_s=500) as client:
        stream = client.stream("Hi")
        asyncio.get_running_loop().call_later(0.3, stream.cancel)
        with pytest.raises(Cancelled):
            await stream.result()
        waiting = asyncio.ensure_future(client.tokenize("Hi"))
        await asyncio.sleep(0.3)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


def test_a_client_that_is_closed_tries_nothing_again(gateway: FakeGateway) -> None:
    gateway.failure = GONE
    client = Client(gateway.address, retry_s=50)
    stream = client.stream("Hi")
    threading.Timer(0.3, client.close).start()
    with pytest.raises(Cancelled, match="closed"):
        stream.result()


def test_a_client_that_is_closed_as_the_next_try_begins_ends_its_calls_as_cancelled(gateway: FakeGateway) -> None:
    gateway.failure = GONE
    with Client(gateway.address, retry_s=50) as client, client.stream("Hi") as stream:
        begin_stream = stream._call._begin  # type: ignore[attr-defined]  # the moment is inside it
        stream._call._begin = lambda: (client.close(), begin_stream())[1]  # type: ignore[attr-defined]  # a private one is replaced
        with pytest.raises(Cancelled, match="closed"):
            stream.result()
    with Client(gateway.address, retry_s=50) as client:
        client._stub.Tokenize = _closes_before_its_second(client._stub.Tokenize, client.close)  # type: ignore[method-assign]  # a stub's call is replaced
        with pytest.raises(Cancelled, match="closed"):
            client.tokenize("Hi")


async def test_an_async_client_that_is_closed_as_the_next_try_begins_ends_its_calls_as_cancelled(
    gateway: FakeGateway,
) -> None:
    gateway.failure = GONE
    async with AsyncClient(gateway.address, retry_s=50) as client:
        stream = client.stream("Hi")
        begin_stream = stream._call._begin  # type: ignore[attr-defined]  # the moment is inside it

        def begin_closed() -> Any:
            client._lifetime.close()
            return begin_stream()

        stream._call._begin = begin_closed  # type: ignore[attr-defined]  # a private one is replaced
        with pytest.raises(Cancelled, match="closed"):
            await stream.result()
    async with AsyncClient(gateway.address, retry_s=50) as client:
        tokenize, tries = client._stub.Tokenize, 0

        async def closes_before_its_second(*args: Any, **options: Any) -> Any:
            nonlocal tries
            tries += 1
            if tries == 2:
                await client.close()
            return await tokenize(*args, **options)

        client._stub.Tokenize = closes_before_its_second  # type: ignore[assignment,method-assign]  # a stub's call is replaced
        with pytest.raises(Cancelled, match="closed"):
            await client.tokenize("Hi")


def _closes_before_its_second(method: Callable[..., Any], close: Callable[[], None]) -> Callable[..., Any]:
    tries = 0

    def called(*args: Any, **options: Any) -> Any:
        nonlocal tries
        tries += 1
        if tries == 2:
            close()
        return method(*args, **options)

    return called


def test_an_answer_is_read_delta_by_delta_after_a_failure() -> None:
    gateway = Recovering(script=[delta("a", [5], 0, 0), delta("b", [6], 1, 1), finish(2)])
    server = fake_gateway.start(gateway)
    try:
        with Client(gateway.address) as client, client.stream("Hi") as stream:
            assert [each.text for each in stream] == ["a", "b"]
    finally:
        server.stop(grace=None).wait(fake_gateway.PATIENCE_S)


@pytest.mark.parametrize("retry_s", [-1, float("nan"), "soon"])
def test_a_limit_that_is_none_is_refused_by_name(retry_s: Any) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(InvalidRequest) as caught:
            kind("127.0.0.1:1", retry_s=retry_s)
        assert caught.value.field == "retry_s"
