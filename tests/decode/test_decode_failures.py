"""What may fail around a decode node, and that nothing is held afterwards. Each world checks that when it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from prefill_fakes import NODE_ID, SPOILERS, a_front, never_answers
from tiny_answers import ask, assert_same, calling, generate_request, send
from tiny_cluster import World, claim_as, doc, eventually, held_engine, ids_of, is_idle, prompt_of, tokens

from spolia_core.errors import Busy, DeadlineExceeded, InternalError, InvalidRequest, Unavailable
from spolia_core.reuse import MissReason, ReuseMode, TokenSource
from spolia_core.sampling import SamplingParams
from spolia_decode.node import DecodeNode
from spolia_engine.adapter import ModelAdapter
from spolia_engine.device_decoding import DeviceSettings
from spolia_engine.drawing import accept_row
from spolia_engine.engine import Engine
from spolia_engine.text import load_decode
from spolia_kvstore.node import KVStoreNode
from spolia_prefill.node import PrefillNode

GREEDY = SamplingParams(max_tokens=8)
LONG = SamplingParams(max_tokens=1000)
LINKED = ReuseMode.LINKED
DOCUMENT = doc(60, 1)
LINKED_PARTS = [tokens(3), DOCUMENT, tokens(9, 2)]


@pytest.mark.parametrize("name", SPOILERS)
@pytest.mark.parametrize("other_node", [True, False])
async def test_a_bad_prefill_node_costs_time_and_nothing_else(world: World, name: str, other_node: bool) -> None:
    await world.store()
    good = await world.prefill(slice_tokens=50)
    front, address = await a_front(world, good, SPOILERS[name])
    decode = await world.decode()
    await world.sees_prefill(decode, 2)
    if not other_node:
        assert decode.view is not None
        decode.view.mark_dead(good.config.node_id)
    answer = await ask(decode, [tokens(200)], GREEDY, prefill_hints=[address])
    assert_same(answer, world.expect([tokens(200)], GREEDY))
    assert front.num_calls == 1
    assert NODE_ID not in answer.report.nodes
    assert (good.config.node_id in answer.report.nodes) == other_node
    assert (answer.report.live_bytes > 0) == other_node


async def test_a_short_deadline_says_nothing_of_the_node_that_missed_it(world: World) -> None:
    await world.store()
    prefill = await world.prefill()
    decode = await world.decode()
    with held_engine(prefill.thread):
        late = await send(decode, generate_request(decode, [tokens(200)], GREEDY), 2.0)
    assert prefill.config.node_id not in late.report.nodes
    answer = await ask(decode, [tokens(200, 3)], GREEDY)
    assert prefill.config.node_id in answer.report.nodes
    assert_same(answer, world.expect([tokens(200, 3)], GREEDY))


async def test_a_bad_prefill_node_compiles_no_chunk_into_an_answer(world: World) -> None:
    store = await world.store()
    good = await world.prefill()
    front, address = await a_front(world, good, SPOILERS["spoils_a_frame"])
    decode = await world.decode()
    await world.sees_prefill(decode, 2)
    await world.kill_store(store)
    answer = await ask(decode, LINKED_PARTS, GREEDY, LINKED, prefill_hints=[address])
    assert_same(answer, world.expect(LINKED_PARTS, GREEDY, LINKED))
    assert front.num_calls == 1


async def test_a_silent_prefill_node_takes_its_share_of_the_time_only(world: World) -> None:
    await world.store()
    good = await world.prefill()
    front, address = await a_front(world, good, never_answers)
    decode = await world.decode(prefill_share=0.1)
    await world.sees_prefill(decode, 2)
    for parts, mode in (([tokens(200)], ReuseMode.EXACT), (LINKED_PARTS, LINKED)):
        answer = await ask(decode, parts, GREEDY, mode, prefill_hints=[address])
        assert_same(answer, world.expect(parts, GREEDY, mode))
        assert good.config.node_id in answer.report.nodes
        assert front.num_calls >= 1


async def test_a_dead_prefill_node_is_done_without(world: World) -> None:
    await world.store()
    prefill = await world.prefill()
    decode = await world.decode()
    await world.kill(prefill)
    answer = await ask(decode, [tokens(200)], GREEDY)
    assert_same(answer, world.expect([tokens(200)], GREEDY))
    assert answer.report.nodes == [decode.config.node_id]
    answer = await ask(decode, LINKED_PARTS, GREEDY, LINKED)
    assert_same(answer, world.expect(LINKED_PARTS, GREEDY, LINKED))
    assert answer.sources[TokenSource.COMPILED] == 44


async def test_a_prefill_node_that_refuses_is_done_without(world: World) -> None:
    await world.store()
    await world.prefill(num_blocks=4)  # no room for anything
    await world.prefill(max_context_tokens=64)  # an error that is not the request's
    decode = await world.decode()
    answer = await ask(decode, [tokens(200)], GREEDY)
    assert_same(answer, world.expect([tokens(200)], GREEDY))
    assert answer.report.nodes == [decode.config.node_id]


Parts = list[Any]
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
    return {"rpc_timeout_s": 0.6} if how == "own limit" else {}


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


async def read_all(call: Any) -> list[Any]:
    """The responses not read yet."""
    responses: list[Any] = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


def queued(node: DecodeNode | PrefillNode) -> Reached:
    """Waits until one task waits for a node's engine."""
    return lambda: eventually(lambda: node.thread.queue_length == 1)


TIMEOUTS = {"cancel": None, "deadline": 0.6, "own limit": None}
HOW = pytest.mark.parametrize("how", TIMEOUTS)
MODES = pytest.mark.parametrize(("parts", "mode"), [([tokens(300)], ReuseMode.EXACT), (LINKED_PARTS, LINKED)])


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


async def test_a_request_waits_for_room_within_its_deadline(world: World) -> None:
    decode = await world.decode(num_blocks=12, max_waiting=1)
    pool, holding_room = decode.engine.pool, SamplingParams(max_tokens=96)
    with held_engine(decode.thread) as release:
        async with calling(decode, generate_request(decode, [tokens(16)], holding_room)) as call:
            await eventually(lambda: decode.admission.num_running == 1)
            held = pool.allocate(7 * pool.block_size)
            with pytest.raises(DeadlineExceeded):
                async with calling(decode, generate_request(decode, [tokens(90)], GREEDY), 0.3) as late:
                    await read_all(late)
            async with calling(decode, generate_request(decode, [tokens(90)], SamplingParams(max_tokens=1))) as waits:
                await eventually(lambda: decode.admission.num_waiting == 1)
                with pytest.raises(Busy) as caught:
                    await ask(decode, [tokens(90)], SamplingParams(max_tokens=16))
                assert caught.value.retry_after_ms > 0
                pool.release(held)
                release()
                await read_all(waits)
            await read_all(call)
    await world.nothing_held()


async def test_the_preempted_go_on_where_they_stood(world: World) -> None:
    """Memory for two answers of three: all are given whole, and as they are where there is room."""
    prompts = [tokens(40, seed) for seed in range(3)]
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    roomy = await world.decode(num_blocks=400)
    expected = [await ask(roomy, [prompt], params) for prompt in prompts]
    decode = await world.decode(num_blocks=22)
    found = await asyncio.gather(*(ask(decode, [prompt], params) for prompt in prompts))
    assert decode.batch.num_preempted > 0
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    assert [answer.text for answer in found] == [answer.text for answer in expected]
    assert [sum(answer.sources.values()) for answer in found] == [40, 40, 40]
    await world.nothing_held()


@MODES
async def test_busy_after_a_prefix_was_found_gives_it_back(world: World, parts: Parts, mode: ReuseMode) -> None:
    await world.store()
    await world.prefill()
    decode = await world.decode(num_blocks=100)
    await ask(decode, parts, GREEDY, mode)
    pool = decode.engine.pool
    await eventually(lambda: is_idle(pool))
    prompt = prompt_of(parts, ids_of(decode.engine))
    chunks = [part.chunk_id for part in prompt.parts if part.chunk_id] or list(
        ids_of(decode.engine).prefix_chain(prompt.token_ids)
    )
    reused = [decode.engine.resident.acquire(chunk_id) for chunk_id in chunks]
    assert all(run is not None for run in reused)
    rest = pool.allocate(pool.available_blocks * pool.block_size)
    with pytest.raises(Busy):
        await ask(decode, parts, GREEDY, mode)
    for extent in (rest, *(run.extent for run in reused if run is not None)):
        pool.release(extent)
    # That nothing else is held, the world checks.


async def test_what_can_never_fit_is_refused_for_good(world: World) -> None:
    decode = await world.decode(num_blocks=8)
    for parts, mode in (([tokens(100)], ReuseMode.EXACT), ([tokens(1), *[doc(33, i) for i in range(3)]], LINKED)):
        with pytest.raises(InvalidRequest, match="blocks"):
            await ask(decode, parts, SamplingParams(max_tokens=20), mode)
    await ask(decode, [tokens(100)], SamplingParams(max_tokens=16))


@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(100, 16), (97, 16), (112, 16), (20, 96), (33, 80)])
async def test_what_just_fits_the_memory_of_a_device_is_answered(
    world: World, num_prompt: int, max_tokens: int
) -> None:
    """Eight blocks, all taken. What the prompt has in a page that is not full goes without its copy before the tail."""
    device = DeviceSettings(row_buckets=(1, 2), min_parts=16)
    adapter = ModelAdapter.load(world.model)
    engine = Engine(adapter, load_decode(world.model), num_blocks=8, block_size=16, device=device)
    decode = await world.decode(engine=engine)
    params = SamplingParams(max_tokens=max_tokens)
    expected = world.expect([tokens(num_prompt)], params)
    assert (await ask(decode, [tokens(num_prompt)], params)).token_ids == list(expected.token_ids)
    with pytest.raises(InvalidRequest, match="9 blocks"):
        await ask(decode, [tokens(num_prompt)], SamplingParams(max_tokens=max_tokens + 16))


async def test_too_many_waiting_are_told_to_come_back(world: World) -> None:
    decode = await world.decode(max_running=1, max_waiting=2)
    with held_engine(decode.thread) as release:
        asked = [asyncio.ensure_future(ask(decode, [tokens(5)], GREEDY)) for _ in range(3)]
        await eventually(lambda: decode.admission.num_waiting == 2)
        with pytest.raises(Busy) as caught:
            await ask(decode, [tokens(5)], GREEDY)
        assert (caught.value.field, caught.value.limit) == ("max_waiting", "2")
        release()
        await asyncio.gather(*asked)


async def test_a_failed_step_fails_its_requests_and_no_later_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = await world.decode()
    step, left = decode.engine.decoding.step_logits, [1]

    def fails_once(sequences: Any) -> Any:
        if left:
            left.pop()
            raise RuntimeError("out of registers")
        return step(sequences)

    monkeypatch.setattr(decode.engine.decoding, "step_logits", fails_once)
    with held_engine(decode.thread):
        asked = [asyncio.ensure_future(ask(decode, [tokens(5, i)], GREEDY)) for i in range(3)]
        await eventually(lambda: decode.thread.queue_length == 3)
    results = await asyncio.gather(*asked, return_exceptions=True)
    failed = [r for r in results if isinstance(r, Exception)]
    assert failed
    assert all(isinstance(r, InternalError) and "out of registers" in str(r) for r in failed)
    for i in range(3):
        assert_same(await ask(decode, [tokens(5, i)], GREEDY), world.expect([tokens(5, i)], GREEDY))


async def test_one_sequence_that_cannot_go_on_fails_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = await world.decode()
    spoilt = SamplingParams(max_tokens=8, seed=13)

    def fails_for_one(generation: Any, row: Any) -> Any:
        if generation.params.seed == 13:
            raise InternalError("not a number")
        return accept_row(generation, row)

    monkeypatch.setattr("spolia_decode.batch.accept_row", fails_for_one)
    with held_engine(decode.thread):
        asked = [asyncio.ensure_future(ask(decode, [tokens(5, i)], spoilt if i == 1 else GREEDY)) for i in range(3)]
        await eventually(lambda: decode.thread.queue_length == 3)
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(results[1], InternalError)
    for i in (0, 2):
        assert not isinstance(results[i], BaseException)
        assert_same(results[i], world.expect([tokens(5, i)], GREEDY))


async def test_a_drain_finishes_running_streams_and_stores_their_answers(world: World) -> None:
    store = await world.store()
    decode = await world.decode()
    params = SamplingParams(max_tokens=150)
    async with calling(decode, generate_request(decode, [tokens(20)], params)) as call:
        await call.read()
        draining = asyncio.ensure_future(decode.server.drain())
        await eventually(lambda: not decode.server.accepting)
        with pytest.raises(Unavailable):
            await ask(decode, [tokens(5)], GREEDY)
        responses = await read_all(call)
    assert responses[-1].finish.num_generated_tokens == 150
    assert await draining
    await decode.close()
    world.workers.remove(decode)
    assert len(store.store.tiers.ram) == 1


async def test_a_claim_of_somebody_dead_is_waited_out_and_taken_over(world: World) -> None:
    store = await world.store()
    decode = await world.decode(store_share=0.02)
    chunk_id = prompt_of(LINKED_PARTS, ids_of(decode.engine)).parts[1].chunk_id
    assert chunk_id is not None
    await claim_as(decode, chunk_id, "somebody/else", ttl_ms=60_000)
    answer = await ask(decode, LINKED_PARTS, GREEDY, LINKED)
    assert [miss.reason for miss in answer.report.misses] == [MissReason.CLAIM_TIMEOUT]
    await eventually(lambda: len(store.store.tiers.ram) == 1)
