"""Prefill in slices: the same KV, sent as it is made; short prompts and other tenants go between; nothing is held."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from prefill_streams import (
    acknowledge,
    compile_work,
    context_work,
    layers_of,
    read_until,
    slices_of,
    start_of,
    streaming,
    token_after,
    whole,
)
from tiny_cluster import NUM_LAYERS, TENANT, World, doc, eventually, held_engine, is_idle, tokens

from spolia.v1.prefill_pb2 import PrefillResponse
from spolia_core.chunk_object import parse_chunk_object
from spolia_core.errors import DeadlineExceeded, Unavailable
from spolia_prefill.node import PrefillNode
from spolia_worker.engine_job import WorkKind
from spolia_worker.engine_metrics import EngineMetrics

PROMPT = tokens(552)
LONG = tokens(1500, 1)
SHORT = tokens(30, 2)


class Slices:
    """Notes each slice that an engine runs, and holds it up behind some of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hold_behind: int = 0) -> None:
        self.ran: list[tuple[str, int]] = []
        """Tenant and tokens."""
        self._gate = threading.Event()
        original = EngineMetrics.computed

        def computed(metrics: EngineMetrics, kind: WorkKind, tenant_id: str, num_tokens: int) -> None:
            original(metrics, kind, tenant_id, num_tokens)
            self.ran.append((tenant_id, num_tokens))
            if len(self.ran) == hold_behind:
                assert self._gate.wait(20)

        monkeypatch.setattr(EngineMetrics, "computed", computed)

    def release(self) -> None:
        self._gate.set()


def handed_off(node: PrefillNode, responses: list[PrefillResponse]) -> tuple[list[int], list[bytes], int]:
    """Slices, layers and first token of a whole stream."""
    return slices_of(responses[0]), layers_of(responses), token_after(node, responses)


async def prefilled(node: PrefillNode, num_cached: int = 0, **fields: Any) -> tuple[list[int], list[bytes], int]:
    return handed_off(node, await whole(node, start_of(node, context=context_work(PROMPT, num_cached, **fields))))


@asynccontextmanager
async def prefilling(node: PrefillNode, prompt: list[int], tenant: str = TENANT) -> AsyncIterator[Any]:
    async with streaming(node, start_of(node, tenant_id=tenant, context=context_work(prompt))) as call:
        yield call


def assert_same(got: tuple[list[int], list[bytes], int], expected: tuple[list[int], list[bytes], int]) -> None:
    """The same KV up to the order of sums, and the same token."""
    for ours, theirs in zip(got[1], expected[1], strict=True):
        np.testing.assert_allclose(np.frombuffer(ours, np.float32), np.frombuffer(theirs, np.float32), atol=1e-4)
    assert got[2] == expected[2]


@pytest.mark.parametrize("num_cached", [0, 128, 512])
async def test_three_slices_are_what_one_pass_is(world: World, num_cached: int) -> None:
    in_slices, at_once = await world.prefill(slice_tokens=200), await world.prefill(slice_tokens=1000)
    expected = await prefilled(at_once, num_cached)
    got = await prefilled(in_slices, num_cached)
    assert expected[0] == [552 - num_cached]
    assert got[0] == {0: [200, 200, 152], 128: [72, 200, 152], 512: [40]}[num_cached]
    assert_same(got, expected)
    # Now 512 tokens are resident: those that the caller lacks go ahead, as a slice of their own.
    again = await prefilled(in_slices, num_cached)
    assert again[0] == {0: [512, 40], 128: [384, 40], 512: [40]}[num_cached]
    assert_same(again, expected)


@pytest.mark.parametrize("num_cached", [0, 128, 512])
async def test_a_caller_that_knows_no_slices_gets_one(world: World, num_cached: int) -> None:
    node = await world.prefill(slice_tokens=200)
    for _ in range(2):  # cold, then with a prefix
        responses = await whole(node, start_of(node, context=context_work(PROMPT, num_cached, accepts_slices=False)))
        assert not responses[0].live_header.slice_tokens
        assert all(r.layer_frame.slice == 0 for r in responses if r.HasField("layer_frame"))
        expected = await prefilled(await world.prefill(slice_tokens=1000), num_cached)
        assert_same(handed_off(node, responses), expected)


async def test_a_slice_leaves_before_the_next_is_computed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await world.prefill(slice_tokens=200)
    slices = Slices(monkeypatch, hold_behind=1)
    async with prefilling(node, PROMPT) as call:
        for layer in range(NUM_LAYERS):  # or they would never come
            responses = await read_until(call, "layer_frame")
            assert (responses[-1].layer_frame.slice, responses[-1].layer_frame.layer) == (0, layer)
            await acknowledge(call, [layer])
        await eventually(lambda: slices.ran == [(TENANT, 200)])
        slices.release()
        await read_until(call, "done")
        for slice_index in (2, 1):  # in any order
            assert not is_idle(node.engine.pool)
            await acknowledge(call, range(NUM_LAYERS), slice_index)
        assert await call.read() is grpc.aio.EOF


async def test_what_is_here_leaves_before_anything_is_computed(world: World) -> None:
    node = await world.prefill(slice_tokens=200)
    await prefilled(node)
    with held_engine(node.thread):
        async with prefilling(node, PROMPT) as call:
            responses = []
            for _ in range(NUM_LAYERS):
                responses += await read_until(call, "layer_frame")
            assert slices_of(responses[0]) == [512, 40]
        await world.nothing_held()  # though its pass never began


async def test_a_short_prompt_waits_for_one_slice_of_a_long_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await world.prefill(slice_tokens=100)
    slices = Slices(monkeypatch, hold_behind=2)
    async with prefilling(node, LONG) as long_call:
        await eventually(lambda: len(slices.ran) == 2)
        async with prefilling(node, SHORT) as short_call:
            await eventually(lambda: node.thread.queue_length == 1)
            slices.release()
            await read_until(short_call, "done")
            assert slices.ran.index((TENANT, 30)) == 2
        await read_until(long_call, "done")
    assert sum(num_tokens for _, num_tokens in slices.ran) == 1530


async def test_tenants_share_an_engine_however_much_one_asks_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await world.prefill(slice_tokens=100)
    slices = Slices(monkeypatch)
    async with AsyncExitStack() as stack:
        for seed in (3, 4, 5):
            call = await stack.enter_async_context(prefilling(node, tokens(1000, seed), "many"))
            await read_until(call, "live_header")
        with held_engine(node.thread):
            quiet = await stack.enter_async_context(prefilling(node, tokens(800, 6), "quiet"))
            await read_until(quiet, "live_header")
            num_before = len(slices.ran)
        await read_until(quiet, "done")
    got: Counter[str] = Counter()
    for tenant, num_tokens in slices.ran[num_before:]:
        got[tenant] += num_tokens
        if got["quiet"] < 800:
            assert got["many"] <= got["quiet"] + 200
    metrics = node.server.metrics
    assert metrics.value("spolia_engine_tokens_total", tenant="quiet") == 800
    await world.nothing_held()
    assert metrics.value("spolia_engine_slices_total", kind="context") == len(slices.ran)


@pytest.mark.parametrize("work", ["context", "compile"])
async def test_a_deadline_ends_a_job_between_two_slices(
    world: World, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    node = await world.prefill(slice_tokens=100)
    slices = Slices(monkeypatch, hold_behind=2)
    long = {"context": context_work(LONG)} if work == "context" else {"compile": compile_work(node, [doc(1500)])}
    with pytest.raises(DeadlineExceeded):
        async with streaming(node, start_of(node, **long), timeout=2.0) as call:
            await read_until(call, "done")
    await eventually(lambda: node.service.num_running == 0)  # the client's clock may be first
    assert not is_idle(node.engine.pool)  # the slice under way cannot be interrupted
    slices.release()
    await world.nothing_held()
    assert slices.ran == [(TENANT, 100), (TENANT, 100)]
    assert is_idle(node.engine.pool)


async def test_a_compile_that_nobody_waits_for_ends_between_two_slices(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await world.store()
    node = await world.prefill(slice_tokens=100)
    slices = Slices(monkeypatch, hold_behind=2)
    async with streaming(node, start_of(node, compile=compile_work(node, [doc(1500)]))):
        await eventually(lambda: len(slices.ran) == 2)
    await eventually(lambda: node.service.num_running == 0)
    await eventually(lambda: store.store.claims.num_live() == 0)
    slices.release()
    await world.nothing_held()
    assert len(slices.ran) == 2
    assert len(store.store.tiers.ram) == 0


async def test_a_chunk_compiled_in_slices_is_the_chunk(world: World) -> None:
    in_slices, at_once = await world.prefill(slice_tokens=16), await world.prefill(slice_tokens=1000)
    document = doc(300, 7)
    objects = []
    for node in (in_slices, at_once):
        responses = await whole(node, start_of(node, compile=compile_work(node, [document], [document])))
        data = b"".join(r.inline_frame.data for r in responses if r.HasField("inline_frame"))
        objects.append(parse_chunk_object(data))
    assert objects[0].meta.chunk_id == objects[1].meta.chunk_id
    for ours, theirs in zip(objects[0].layers, objects[1].layers, strict=True):
        for got, expected in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(np.frombuffer(got, np.float32), np.frombuffer(expected, np.float32), atol=1e-4)
    assert in_slices.server.metrics.value("spolia_engine_slices_total", kind="compile") == 19
    assert at_once.server.metrics.value("spolia_engine_slices_total", kind="compile") == 1


async def test_the_load_of_a_node_falls_slice_by_slice(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await world.prefill(slice_tokens=100)
    with held_engine(node.thread):
        async with prefilling(node, LONG) as call:
            await read_until(call, "live_header")
            assert node.record().load.queued_tokens == 1500
        await world.nothing_held()  # while the engine is held, so that none of its slices is counted below
    slices = Slices(monkeypatch, hold_behind=3)
    async with prefilling(node, LONG) as call:
        await eventually(lambda: len(slices.ran) == 3)
        assert node.record().load.queued_tokens == 1200
        slices.release()
        await read_until(call, "done")
        assert (node.service.num_running, node.record().load.queued_tokens) == (1, 0)
    document = doc(400, 8)
    await whole(node, start_of(node, compile=compile_work(node, [document])))
    assert node.service.queued_tokens == 0


async def test_a_prefix_that_is_here_is_no_load(world: World) -> None:
    node = await world.prefill(slice_tokens=100)
    await prefilled(node)
    with held_engine(node.thread):
        async with prefilling(node, PROMPT) as call:
            await read_until(call, "live_header")
            assert node.record().load.queued_tokens == 40
        async with streaming(node, start_of(node, context=context_work(tokens(552, 9), 128))) as call:
            await read_until(call, "live_header")
            assert node.record().load.queued_tokens == 552  # neither is what only the caller has spared


async def test_callers_that_leave_anywhere_leave_nothing(world: World) -> None:
    node = await world.prefill(slice_tokens=32)

    async def one(number: int) -> None:
        prompt = tokens(150 + 10 * number, number % 5)
        async with prefilling(node, prompt, f"tenant {number % 3}") as call:
            for _ in range(number % 9):
                response = await call.read()
                if response is not grpc.aio.EOF and response.HasField("layer_frame"):
                    await acknowledge(call, [response.layer_frame.layer], response.layer_frame.slice)

    await asyncio.gather(*(one(number) for number in range(30)))
    await world.nothing_held()


async def test_metrics_are_there_from_the_start(world: World) -> None:
    for node in (await world.prefill(), await world.decode()):
        metrics = node.server.metrics
        for kind in WorkKind:
            count = metrics.registry.get_sample_value("spolia_engine_queue_seconds_count", {"kind": kind.value})
            assert count == 0
        for kind in ("compile", "context", "link"):
            assert metrics.registry.get_sample_value("spolia_engine_slices_total", {"kind": kind}) == 0
        assert "spolia_engine_tokens" in {family.name for family in metrics.registry.collect()}


async def test_a_job_that_finds_no_engine_leaves_nothing(world: World) -> None:
    node = await world.prefill(slice_tokens=100)
    await prefilled(node)  # so that there is a prefix to hold, and to send
    await node.thread.stop()
    with pytest.raises(Unavailable):
        await prefilled(node)
    await world.nothing_held()


async def test_a_node_that_ends_in_the_middle_of_a_pass_leaves_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await world.prefill(slice_tokens=100)
    slices = Slices(monkeypatch, hold_behind=2)
    async with prefilling(node, LONG) as call:
        await eventually(lambda: len(slices.ran) == 2)
        stopping = asyncio.ensure_future(node.thread.stop())
        await asyncio.sleep(0.05)
        slices.release()
        await stopping
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_until(call, "done")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await world.nothing_held()
    assert len(slices.ran) == 2
