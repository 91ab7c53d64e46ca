"""A request may end in any phase, by its caller or by a deadline: nothing is held afterwards, as each world checks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from decode_requests import GREEDY, LINKED, LINKED_PARTS, LONG, MODES, read_all
from tiny_answers import ask, assert_same, calling, generate_request
from tiny_cluster import Parts, World, eventually, held_engine, is_idle, tokens

from spolia_core.errors import DeadlineExceeded
from spolia_core.reuse import ReuseMode
from spolia_decode.node import DecodeNode
from spolia_kvstore.node import KVStoreNode
from spolia_prefill.node import PrefillNode

Reached = Callable[[], Awaitable[Any]]


def holding(name: str, gate: asyncio.Event, entered: asyncio.Event) -> Callable[[KVStoreNode], None]:
    """Lets a store's method answer only when `gate` is set."""

    def prepare(node: KVStoreNode) -> None:
        service: Any = node._kvstore_server
        original = getattr(service, name)

        async def held(request: Any, context: Any) -> Any:
            entered.set()
            await gate.wait()
            return await original(request, context)

        async def held_stream(request: Any, context: Any) -> AsyncIterator[Any]:
            entered.set()
            await gate.wait()
            async for response in original(request, context):
                yield response

        setattr(service, name, held_stream if name == "Get" else held)

    return prepare


def limits(how: str) -> dict[str, Any]:
    """Settings of a decode node whose requests are to end in some way."""
    return {"rpc_timeout_s": 1.2} if how == "own limit" else {}


async def end_by(how: str, decode: DecodeNode, parts: Parts, mode: ReuseMode, reached: Reached) -> None:
    """Sends a request and waits until it has `reached` a phase; then its caller drops it, or its time passes."""
    async with calling(decode, generate_request(decode, parts, LONG, mode), TIMEOUTS[how]) as call:
        reading = asyncio.ensure_future(read_all(call))
        await reached()
        if how == "cancel":
            call.cancel()
            with pytest.raises((asyncio.CancelledError, grpc.aio.AioRpcError)):
                await reading
            return
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reading
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def queued(node: DecodeNode | PrefillNode) -> Reached:
    """Waits until one task waits for a node's engine."""
    return lambda: eventually(lambda: node.thread.queue_length == 1)


TIMEOUTS = {"cancel": None, "deadline": 1.2, "own limit": None}

HOW = pytest.mark.parametrize("how", TIMEOUTS)


@HOW
async def test_ending_a_request_that_waits_for_a_place(world: World, how: str) -> None:
    decode = await world.decode(max_running=1, **limits(how))
    with held_engine(decode.thread):
        async with calling(decode, generate_request(decode, [tokens(5)], LONG)) as first:
            await eventually(lambda: decode.admission.num_running == 1)
            is_waiting = lambda: decode.admission.num_waiting == 1  # noqa: E731  (one of two conditions, chosen here)
            await end_by(how, decode, [tokens(5)], ReuseMode.EXACT, lambda: eventually(is_waiting))
            await eventually(lambda: decode.admission.num_waiting == 0)
            first.cancel()
        await world.nothing_held()  # though the engine is still busy
    assert_same(await ask(decode, [tokens(5)], GREEDY), world.expect([tokens(5)], GREEDY))


@HOW
@pytest.mark.parametrize(
    ("parts", "mode", "method"),
    [
        ([tokens(300)], ReuseMode.EXACT, "Lookup"),
        ([tokens(300)], ReuseMode.EXACT, "Get"),
        (LINKED_PARTS, LINKED, "Get"),
    ],
)
async def test_ending_a_request_that_fetches(
    world: World, how: str, parts: Parts, mode: ReuseMode, method: str
) -> None:
    gate, entered = asyncio.Event(), asyncio.Event()
    gate.set()
    store = await world.store(holding(method, gate, entered))
    first, decode = await world.decode(), await world.decode(store_share=1.0, **limits(how))
    await ask(first, parts, GREEDY, mode)
    await first.parts.publisher.drain()
    assert len(store.store.tiers.ram) > 0
    entered.clear()
    gate.clear()
    await end_by(how, decode, parts, mode, entered.wait)
    await eventually(lambda: is_idle(decode.engine.pool), "the fetch holds memory")
    gate.set()


@HOW
@MODES
async def test_ending_a_request_that_waits_for_a_prefill_node(
    world: World, how: str, parts: Parts, mode: ReuseMode
) -> None:
    await world.store()
    prefill = await world.prefill()
    decode = await world.decode(prefill_share=1.0, **limits(how))
    with held_engine(prefill.thread):
        await end_by(how, decode, parts, mode, queued(prefill))
        await world.nothing_held()  # on both nodes and in the store, though the engine is still busy


@HOW
@MODES
async def test_ending_a_request_that_computes_here(world: World, how: str, parts: Parts, mode: ReuseMode) -> None:
    await world.store()
    decode = await world.decode(local_prefill_tokens=1000, **limits(how))
    with held_engine(decode.thread):
        await end_by(how, decode, parts, mode, queued(decode))
        await world.nothing_held()


@HOW
async def test_ending_a_request_that_links(world: World, how: str) -> None:
    await world.store()
    decode = await world.decode(**limits(how))
    await ask(decode, LINKED_PARTS, GREEDY, LINKED)
    with held_engine(decode.thread):
        await end_by(how, decode, LINKED_PARTS, LINKED, queued(decode))
        await world.nothing_held()


@MODES
async def test_ending_a_request_that_decodes(world: World, parts: Parts, mode: ReuseMode) -> None:
    await world.store()
    await world.prefill()
    decode = await world.decode()
    async with calling(decode, generate_request(decode, parts, LONG, mode)) as call:
        for _ in range(5):
            await call.read()
        call.cancel()
    await world.nothing_held()


@pytest.mark.parametrize("how", ["deadline", "own limit"])
async def test_a_deadline_that_passes_while_decoding(world: World, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    decode = await world.decode(**limits(how))
    step = decode.engine.decoding.step_logits

    def slow(sequences: Any) -> Any:
        time.sleep(0.02)
        return step(sequences)

    monkeypatch.setattr(decode.engine.decoding, "step_logits", slow)
    with pytest.raises(DeadlineExceeded):
        async with calling(decode, generate_request(decode, [tokens(5)], LONG), TIMEOUTS[how]) as call:
            await read_all(call)
