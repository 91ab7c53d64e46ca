"""Laws of answers under way."""

from __future__ import annotations

import asyncio

import pytest
from fake_gateway import PATIENCE_S, FakeGateway, Hang, delta

from spolia import AsyncClient, Cancelled, Client, DeadlineExceeded, Delta, Unavailable

HELLO_DELTAS = [Delta("Hé", (5,), 0), Delta("", (6,), 1), Delta("llo", (7, 8), 2)]


def test_deltas_come_in_order_and_the_result_after_them(gateway: FakeGateway) -> None:
    with Client(gateway.address) as client, client.stream("Hi") as stream:
        assert list(stream) == HELLO_DELTAS
        assert stream.result().text == "Héllo"
        assert list(stream) == []


def test_asking_for_the_result_in_the_loop_reads_what_is_left(gateway: FakeGateway) -> None:
    with Client(gateway.address) as client, client.stream("Hi") as stream:
        seen = []
        for delta_ in stream:
            seen.append(delta_)
            assert stream.result().token_ids == (5, 6, 7, 8)
        assert seen == HELLO_DELTAS[:1]


def test_breaking_out_of_the_loop_cancels(gateway: FakeGateway) -> None:
    gateway.script = [delta("a", [5], 0, 0), Hang()]
    with Client(gateway.address) as client:
        stream = client.stream("Hi")
        for _ in stream:
            break
        assert gateway.caller_gone.wait(PATIENCE_S)
        with pytest.raises(Cancelled):
            stream.result()


def test_leaving_the_block_cancels(gateway: FakeGateway) -> None:
    gateway.script = [delta("a", [5], 0, 0), Hang()]
    with Client(gateway.address) as client:
        with client.stream("Hi") as stream:
            deltas = iter(stream)
            next(deltas)
        assert gateway.caller_gone.wait(PATIENCE_S)
        with pytest.raises(Cancelled):
            next(deltas)


def test_closing_the_client_ends_its_streams(gateway: FakeGateway) -> None:
    gateway.script = [delta("a", [5], 0, 0), Hang()]
    client = Client(gateway.address)
    stream = client.stream("Hi")
    deltas = iter(stream)
    next(deltas)
    client.close()
    with pytest.raises(Cancelled, match="client was closed"):
        next(deltas)
    assert gateway.caller_gone.wait(PATIENCE_S)


def test_cancel_ends_the_wait_with_a_typed_error(gateway: FakeGateway) -> None:
    gateway.script = [delta("a", [5], 0, 0), Hang()]
    with Client(gateway.address) as client:
        deltas = iter(stream := client.stream("Hi"))
        next(deltas)
        stream.cancel()
        with pytest.raises(Cancelled):
            next(deltas)
        with pytest.raises(Cancelled):
            stream.result()
        assert gateway.caller_gone.wait(PATIENCE_S)


def test_cancelling_a_whole_answer_changes_nothing(gateway: FakeGateway) -> None:
    with Client(gateway.address) as client:
        stream = client.stream("Hi")
        assert stream.result().text == "Héllo"
        stream.cancel()
        assert stream.result().text == "Héllo"


def test_a_failed_stream_stays_failed(gateway: FakeGateway) -> None:
    gateway.script = [delta("a", [5], 0, 0), Unavailable("gone")]
    with Client(gateway.address) as client:
        stream = client.stream("Hi")
        for _ in range(2):
            with pytest.raises(Unavailable, match="gone"):
                stream.result()


def test_nobody_at_the_address_is_unavailable() -> None:
    with Client("127.0.0.1:1", retry_s=0) as client, pytest.raises(Unavailable):
        client.generate("Hi")


async def test_async_deltas_come_in_order_and_the_result_after_them(gateway: FakeGateway) -> None:
    async with AsyncClient(gateway.address) as client, client.stream("Hi") as stream:
        assert [d async for d in stream] == HELLO_DELTAS
        assert (await stream.result()).text == "Héllo"


async def test_async_breaking_out_of_the_loop_cancels(gateway: FakeGateway) -> None:
    gateway.script = [delta("a", [5], 0, 0), Hang()]
    async with AsyncClient(gateway.address) as client:
        stream = client.stream("Hi")
        async for _ in stream:
            break
        assert await asyncio.to_thread(gateway.caller_gone.wait, PATIENCE_S)
        with pytest.raises(Cancelled):
            await stream.result()


async def test_async_leaving_the_block_cancels(gateway: FakeGateway) -> None:
    gateway.script = [delta("a", [5], 0, 0), Hang()]
    async with AsyncClient(gateway.address) as client:
        async with client.stream("Hi") as stream:
            deltas = aiter(stream)
            await anext(deltas)
        assert await asyncio.to_thread(gateway.caller_gone.wait, PATIENCE_S)


async def test_async_cancelling_the_task_cancels_the_request_and_stays_a_cancellation(gateway: FakeGateway) -> None:
    gateway.script = [delta("a", [5], 0, 0), Hang()]
    async with AsyncClient(gateway.address) as client:
        first = asyncio.Event()

        async def read() -> None:
            async for _ in client.stream("Hi"):
                first.set()

        task = asyncio.create_task(read())
        async with asyncio.timeout(PATIENCE_S):
            await first.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(gateway.caller_gone.wait, PATIENCE_S)


async def test_async_waits_end_with_the_time_limit(gateway: FakeGateway) -> None:
    gateway.script = [delta("a", [5], 0, 0), Hang()]
    async with AsyncClient(gateway.address, timeout_s=0.3) as client:
        with pytest.raises(DeadlineExceeded):
            async for _ in client.stream("Hi"):
                pass


def test_an_async_client_may_be_built_before_its_loop_runs(gateway: FakeGateway) -> None:
    client = AsyncClient(gateway.address)

    async def use() -> str:
        async with client:
            return (await client.generate("Hi")).text

    assert asyncio.run(use()) == "Héllo"
