"""Exact contexts: live KV layer by layer, by reference to what the caller has; and nothing held once a caller goes."""

from __future__ import annotations

import asyncio
import threading

import grpc
import numpy as np
import pytest
from prefill_streams import (
    acknowledge,
    context_work,
    layers_of,
    leave,
    read_until,
    start_of,
    streaming,
    token_after,
    whole,
)
from tiny_answers import ask
from tiny_cluster import NUM_LAYERS, World, eventually, held_engine, is_idle, tokens

from spolia.errors import error_from_rpc
from spolia_core.errors import Busy, DeadlineExceeded, SpoliaError, Unavailable
from spolia_core.sampling import SamplingParams
from spolia_engine.kv_bytes import layer_of_run
from spolia_engine.run import Run
from spolia_prefill.handoff import LayerStream

PROMPT = tokens(552)


def expected_layers(world: World, token_ids: list[int], first: int) -> tuple[list[bytes], int]:
    """What a single process has for the tokens from `first` on, and the token it draws after them."""
    engine = world.oracle()
    context = engine.exact_context(token_ids, [])
    live = context.spans[0].run
    run = Run(live.extent, first, live.num_tokens - first, first)
    layers = [b"".join(layer_of_run(run, layer)) for layer in range(NUM_LAYERS)]
    return layers, engine.decoding.first_token(context, SamplingParams())


def assert_close(got: list[bytes], expected: list[bytes]) -> None:
    assert [len(layer) for layer in got] == [len(layer) for layer in expected]
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.frombuffer(ours, np.float32), np.frombuffer(theirs, np.float32), atol=1e-4)


@pytest.mark.parametrize("num_cached", [0, 128, 512])
async def test_live_kv_is_what_a_single_process_computes(world: World, num_cached: int) -> None:
    await world.store()
    node = await world.prefill()
    expected, token = expected_layers(world, PROMPT, num_cached)
    per_token = node.engine.adapter.kv_shape.bytes_per_token
    for _ in range(2):  # cold: the node computes all of it; then it has the prefix, and what is sent stays the same
        responses = await whole(node, start_of(node, context=context_work(PROMPT, num_cached)))
        kinds = [r.WhichOneof("message") for r in responses]
        assert (kinds[0], kinds[-2], kinds[-1]) == ("live_header", "last_hidden", "done")
        header = responses[0].live_header
        assert (header.first_position, header.num_tokens) == (num_cached, len(PROMPT) - num_cached)
        layers = layers_of(responses)
        assert_close(layers, expected)
        # 512 cached tokens and 40 new ones: 40 tokens' worth of bytes, wherever the 512 come from.
        assert sum(map(len, layers)) == (len(PROMPT) - num_cached) * per_token
        assert token_after(node, responses) == token
    assert responses[-1].done.num_cached_tokens == 512
    assert responses[-1].done.num_computed_tokens == 40


async def test_a_prefix_is_fetched_rather_than_computed(world: World) -> None:
    store = await world.store()
    decode = await world.decode()
    first = await world.prefill()
    await ask(decode, [PROMPT], SamplingParams(max_tokens=1))
    await eventually(lambda: len(store.store.tiers.ram) == 4)
    expected, token = expected_layers(world, PROMPT, 512)
    responses = await whole(first, start_of(first, context=context_work(PROMPT, 512)))
    assert_close(layers_of(responses), expected)
    assert responses[-1].done.num_computed_tokens == 40
    assert token_after(first, responses) == token


class Held:
    """Holds the engine up once it has computed a layer, as often as asked; says which layers it came to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.seen: list[tuple[int, int]] = []
        """First position of the slice, and layer."""
        self._at = at
        self._gate = threading.Event()
        original = LayerStream.layer_done

        def held(stream: LayerStream, run: Run, layer: int) -> None:
            self.seen.append((run.rope_base, layer))
            original(stream, run, layer)
            if len(self.seen) == self._at:
                assert self._gate.wait(20)

        monkeypatch.setattr(LayerStream, "layer_done", held)

    def release(self) -> None:
        self._gate.set()


async def test_layers_leave_while_later_ones_are_computed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await world.prefill()
    held = Held(monkeypatch, 1)
    async with streaming(node, start_of(node, context=context_work(PROMPT[:200]))) as call:
        await read_until(call, "layer_frame")  # or it would never come
        held.release()
        await read_until(call, "done")
        await acknowledge(call, range(NUM_LAYERS))
        assert await call.read() is grpc.aio.EOF


async def test_missing_acknowledgements_end_the_lease_and_free_the_memory(world: World) -> None:
    node = await world.prefill(ack_lease_s=0.3)
    async with streaming(node, start_of(node, context=context_work(PROMPT[:200]))) as call:
        await read_until(call, "done")
        assert not is_idle(node.engine.pool)
        await acknowledge(call, range(NUM_LAYERS - 1))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    error = error_from_rpc(caught.value)
    assert isinstance(error, Unavailable)
    assert (error.field, error.limit) == ("ack", "0.3 s")
    await world.nothing_held()


async def test_live_kv_is_held_until_the_last_acknowledgement_and_no_longer(world: World) -> None:
    node = await world.prefill()
    async with streaming(node, start_of(node, context=context_work(PROMPT[:200]))) as call:
        await read_until(call, "done")
        await acknowledge(call, [2, 0])  # in any order
        assert not is_idle(node.engine.pool)
        await acknowledge(call, [1])
        assert await call.read() is grpc.aio.EOF
        assert (await call.code()) is grpc.StatusCode.OK
        await world.nothing_held()


@pytest.mark.parametrize("when", ["before it began", "header", "layer_frame", "last_hidden", "done"])
@pytest.mark.parametrize("how", ["drop", "cancel", "half-close"])
async def test_a_caller_that_goes_leaves_nothing(world: World, when: str, how: str) -> None:
    await world.store()
    node = await world.prefill()
    await whole(node, start_of(node, context=context_work(PROMPT[:300])))  # so that a prefix is found
    with held_engine(node.thread) as release:
        async with streaming(node, start_of(node, context=context_work(PROMPT))) as call:
            await read_until(call, "live_header")
            await eventually(lambda: node.thread.queue_length == 1)
            if when == "header":
                release()
            elif when != "before it began":
                release()
                await read_until(call, when)
            await leave(call, how)
        await world.nothing_held()
    assert node.service.num_running == 0


async def test_a_pass_nobody_waits_for_ends_at_its_next_layer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await world.prefill()
    held = Held(monkeypatch, 1)
    async with streaming(node, start_of(node, context=context_work(PROMPT))) as call:
        await read_until(call, "layer_frame")
    await eventually(lambda: node.service.num_running == 0)
    held.release()
    await world.nothing_held()
    assert held.seen == [(0, 0), (0, 1)]


async def test_a_job_ends_at_the_nodes_own_limit(world: World) -> None:
    node = await world.prefill(rpc_timeout_s=0.3)
    with held_engine(node.thread):
        with pytest.raises(DeadlineExceeded):
            async with streaming(node, start_of(node, context=context_work(PROMPT)), timeout=None) as call:
                await read_until(call, "done")
        with pytest.raises(DeadlineExceeded):
            async with streaming(node, None, timeout=None) as call:  # a caller that never starts
                await call.read()
        await world.nothing_held()


async def test_a_pool_without_room_is_busy(world: World) -> None:
    node = await world.prefill(num_blocks=10)
    with pytest.raises(Busy):
        await whole(node, start_of(node, context=context_work(PROMPT)))
    await world.nothing_held()


async def test_a_pass_that_fails_fails_its_job_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await world.prefill()
    with monkeypatch.context() as patch:

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("broken")

        patch.setattr(node.engine.adapter, "forward_steps", fail)
        with pytest.raises(SpoliaError):
            await whole(node, start_of(node, context=context_work(PROMPT)))
    await world.nothing_held()
    assert layers_of(await whole(node, start_of(node, context=context_work(PROMPT))))


async def test_callers_that_come_and_go_leave_nothing(world: World) -> None:
    await world.store()
    node = await world.prefill()

    async def one(number: int) -> None:
        async with streaming(node, start_of(node, context=context_work(tokens(200 + number, number)))) as call:
            for _ in range(number % 6):
                await call.read()

    await asyncio.gather(*(one(number) for number in range(24)))
    await world.nothing_held()
