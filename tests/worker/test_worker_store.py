"""What nodes with an engine do with a store: publish runs, hold and give back claims, take chunks from it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_cluster import TENANT, World, claim_as, damage, eventually, fetch_one, ids_of, is_idle, stored_bytes, tokens

from spolia.v1.kvstore_pb2 import LookupEntry
from spolia_core.chunk_object import parse_chunk_object
from spolia_core.errors import InvalidRequest
from spolia_core.reuse import ChunkKind, MissReason
from spolia_decode.node import DecodeNode
from spolia_engine.kv_bytes import layer_of_run
from spolia_engine.run import Run
from spolia_engine.sealing import prefix_blocks
from spolia_node.deadline import Deadline
from spolia_node.store_stream import FetchedChunk
from spolia_worker.arriving import ArrivingChunk, ChunkLost
from spolia_worker.claims import ClaimOutcome
from spolia_worker.config import WorkerConfig
from spolia_worker.loading import load_engine

SOON = 30.0


async def a_chunk(node: DecodeNode, count: int, seed: int = 0) -> tuple[bytes, Run]:
    """A local chunk computed on a node; the caller owns a reference on its run."""
    token_ids = tokens(count, seed)
    chunk_id = ids_of(node.engine).local(token_ids)
    return chunk_id, await node.thread.run(lambda: node.engine.compile(chunk_id, token_ids))


async def test_what_is_published_is_what_was_computed(world: World) -> None:
    store = await world.store()
    node = await world.decode()
    publisher, pool = node.parts.publisher, node.engine.pool
    chunk_id, run = await a_chunk(node, 30)
    publisher.publish(TENANT, ChunkKind.LOCAL, [(chunk_id, run)])
    pool.release(run.extent)
    assert not is_idle(pool)  # until it is stored
    await publisher.drain()
    assert is_idle(pool)
    parsed = parse_chunk_object(stored_bytes(store, chunk_id))
    for layer, (key, value) in enumerate(parsed.layers):
        assert (bytes(key), bytes(value)) == layer_of_run(run, layer)
    publisher.publish(TENANT, ChunkKind.LOCAL, [(chunk_id, run)])  # again: the store has it
    await publisher.drain()
    assert (store.store.counters.puts, publisher.num_dropped, publisher.num_pending) == (1, 0, 0)


async def test_publishing_that_is_stopped_gives_its_references_back(world: World) -> None:
    await world.store()
    node = await world.decode()
    chunk_id, run = await a_chunk(node, 30)
    for has_begun in (False, True):
        node.parts.publisher.publish(TENANT, ChunkKind.LOCAL, [(chunk_id, run)])
        if has_begun:
            await asyncio.sleep(0)
        await node.parts.publisher.stop()
        assert run.extent.ref_count == 1
        assert node.parts.publisher.num_pending == 0
    node.engine.pool.release(run.extent)


async def test_what_cannot_be_published_is_counted_and_its_claim_given_back(world: World) -> None:
    store = await world.store(budget_bytes=10)
    node = await world.decode()
    publisher = node.parts.publisher
    publisher._max_pending = 1
    chunks = [await a_chunk(node, 30, seed) for seed in range(2)]
    for chosen in (chunks[:1], chunks):  # no room in the store; too many at once
        deadline = Deadline.after(SOON)
        claim = await node.parts.claims.take(TENANT, chunks[0][0], "request", deadline, deadline)
        assert claim.outcome is ClaimOutcome.GRANTED
        publisher.publish(TENANT, ChunkKind.LOCAL, chosen, claim)
        await publisher.drain()
        await node.parts.claims.drain()
        assert store.store.claims.num_live() == 0
    assert publisher.num_dropped == 3
    for _, run in chunks:
        node.engine.pool.release(run.extent)


async def test_claims_are_granted_held_or_stored(world: World) -> None:
    await world.store()
    node = await world.decode()
    claims, now = node.parts.claims, Deadline.after(0)
    chunk_id, run = await a_chunk(node, 30)

    async def take(waiting: Deadline) -> ClaimOutcome:
        claim = await claims.take(TENANT, chunk_id, "request", waiting, Deadline.after(SOON))
        with claim:
            return claim.outcome

    assert await take(now) is ClaimOutcome.GRANTED
    await claims.drain()
    with await claims.take(TENANT, chunk_id, "request", now, Deadline.after(SOON)) as first:
        assert await take(now) is ClaimOutcome.HELD  # a second request of that name is another owner
        assert await take(Deadline.after(0.2)) is ClaimOutcome.HELD
        waiting = asyncio.ensure_future(take(Deadline.after(SOON)))
        await node.parts.publisher.put(
            TENANT,
            await node.parts.publisher.to_bytes(chunk_id, ChunkKind.LOCAL, run),
            Deadline.after(SOON),
            first,
        )
        assert await waiting is ClaimOutcome.STORED
    node.engine.pool.release(run.extent)


async def test_a_claim_asked_for_by_somebody_who_goes_is_given_back(world: World) -> None:
    store = await world.store()
    node = await world.decode()
    chunk_id, deadline = bytes(32), Deadline.after(SOON)
    for turns in range(8):
        task = asyncio.ensure_future(node.parts.claims.take(TENANT, chunk_id, "request", deadline, deadline))
        for _ in range(turns):
            await asyncio.sleep(0.001)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            (await task).give_back()
        await node.parts.claims.drain()
    await eventually(lambda: store.store.claims.num_live() == 0)


async def test_a_claim_stands_as_long_as_its_work_takes(world: World) -> None:
    store = await world.store()
    node = await world.decode(claim_ttl_s=1.5)
    claims, chunk_id = node.parts.claims, bytes(32)

    async def others_outcome(wait_s: float = 0) -> ClaimOutcome:
        with await claims.take(TENANT, chunk_id, "other", Deadline.after(wait_s), Deadline.after(SOON)) as claim:
            return claim.outcome

    with await claims.take(TENANT, chunk_id, "slow", Deadline.after(0), Deadline.after(SOON)):
        for _ in range(4):
            await asyncio.sleep(0.6)
            assert await others_outcome() is ClaimOutcome.HELD
    await claims.drain()
    assert store.store.claims.num_live() == 0  # no renewal came after it was given back
    with await claims.take(TENANT, chunk_id, "late", Deadline.after(0), Deadline.after(0.4)):
        assert await others_outcome(SOON) is ClaimOutcome.GRANTED  # its request is past its deadline
    await claims.drain()


async def test_without_a_store_there_is_no_claim_and_no_error(world: World) -> None:
    store = await world.store()
    with_dead, with_none = await world.decode(), await world.decode(directory="")
    await world.kill_store(store)
    for node in (with_dead, with_none):
        claim = await node.parts.claims.take(TENANT, bytes(32), "r", Deadline.after(0.2), Deadline.after(SOON))
        assert (claim.outcome, claim.owner) == (ClaimOutcome.NO_STORE, "")


async def test_fetched_chunks_are_the_stored_ones_and_misses_say_why(world: World) -> None:
    store = await world.store()
    giver, taker = await world.decode(), await world.decode()
    chunks = [await a_chunk(giver, 20 + seed, seed) for seed in range(3)]
    giver.parts.publisher.publish(TENANT, ChunkKind.LOCAL, chunks)
    await giver.parts.publisher.drain()
    for _, run in chunks:
        giver.engine.pool.release(run.extent)
    (good, run), (damaged, _), (wrong_length, _) = chunks
    damage(store, damaged)
    fetcher, core = taker.parts.fetcher, taker.engine
    came = await fetch_one(fetcher, core, good, 20)
    assert isinstance(came, Run)
    for layer in range(3):
        assert layer_of_run(came, layer) == layer_of_run(run, layer)
    assert good in core.resident
    for chunk_id, num_tokens, reason in (
        (damaged, 21, MissReason.DIGEST),
        (wrong_length, 99, MissReason.DIGEST),
        (bytes(32), 5, MissReason.NOT_FOUND),
    ):
        assert await fetch_one(fetcher, core, chunk_id, num_tokens) is reason
        assert chunk_id not in core.resident
    core.pool.release(came.extent)
    assert is_idle(core.pool)


async def test_an_object_that_is_whole_and_holds_no_chunk_is_damaged(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.store()
    node = await world.decode()

    async def empty(tenant_id: str, ids: Sequence[bytes], *_: Any, **__: Any) -> AsyncIterator[FetchedChunk]:
        yield FetchedChunk(0, ids[0], LookupEntry(), bytearray(), None)

    monkeypatch.setattr(node.parts.store, "get", empty)
    assert await fetch_one(node.parts.fetcher, node.engine, bytes(32), 20) is MissReason.DIGEST
    assert is_idle(node.engine.pool)


async def test_a_chunk_is_not_found_until_its_put_has_ended(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its bytes may have come: nobody has stored it before all of them were checked."""
    store = await world.store()
    giver, taker = await world.decode(), await world.decode()
    chunk_id, run = await a_chunk(giver, 20)
    finish, arrived, gate = store.store.puts.finish, asyncio.Event(), asyncio.Event()

    async def held(*args: Any, **kwargs: Any) -> Any:
        arrived.set()
        await gate.wait()
        return await finish(*args, **kwargs)

    monkeypatch.setattr(store.store.puts, "finish", held)
    giver.parts.publisher.publish(TENANT, ChunkKind.LOCAL, [(chunk_id, run)])
    giver.engine.pool.release(run.extent)
    await asyncio.wait_for(arrived.wait(), SOON)
    assert await fetch_one(taker.parts.fetcher, taker.engine, chunk_id, 20) is MissReason.NOT_FOUND
    gate.set()
    await giver.parts.publisher.drain()
    came = await fetch_one(taker.parts.fetcher, taker.engine, chunk_id, 20)
    assert isinstance(came, Run)
    taker.engine.pool.release(came.extent)


async def test_a_late_store_is_a_miss(world: World) -> None:
    await world.store()
    node = await world.decode()
    chunk = ArrivingChunk(node.engine, bytes(32), 5)
    received = await node.parts.fetcher.fetch_arriving(TENANT, chunk, Deadline.after(0), lambda: None)
    assert received.miss is MissReason.STORE_LATE
    with pytest.raises(ChunkLost):
        chunk.has(0)
    chunk.release()
    fetched = await node.parts.fetcher.fetch_prefix(TENANT, prefix_blocks([bytes(32)]), Deadline.after(0))
    assert fetched.misses == {bytes(32): MissReason.STORE_LATE}


async def test_another_model_s_chunk_is_a_miss_by_fingerprint(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.store()
    node = await world.decode()
    chunk_id, run = await a_chunk(node, 20)
    node.parts.publisher.publish(TENANT, ChunkKind.LOCAL, [(chunk_id, run)])
    await node.parts.publisher.drain()
    node.engine.pool.release(run.extent)
    monkeypatch.setattr(node.engine.adapter, "fingerprint", b"f" * 32)
    assert await fetch_one(node.parts.fetcher, node.engine, chunk_id, 20) is MissReason.FINGERPRINT


async def test_somebody_else_s_claim_is_left_alone(world: World) -> None:
    store = await world.store()
    node = await world.decode()
    await claim_as(node, bytes(32), "somebody/else", ttl_ms=400)
    claim = await node.parts.claims.take(TENANT, bytes(32), "r", Deadline.after(0), Deadline.after(SOON))
    claim.give_back()
    await node.parts.claims.drain()
    assert (claim.outcome, store.store.claims.num_live()) == (ClaimOutcome.HELD, 1)


@pytest.mark.parametrize(
    ("change", "field"),
    [({"model": ""}, "model"), ({"device": "toaster"}, "device"), ({"device": "cuda:99"}, "device")],
)
def test_settings_that_cannot_work_are_refused_by_name(model: Path, change: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        load_engine(WorkerConfig(**{"model": str(model), **change}))  # type: ignore[arg-type]  # fields differ in type
    assert caught.value.field == field


async def run_process(role: str, model: Path, *, until_ready: bool) -> tuple[bytes, bytes, int | None]:
    """What a node's process wrote before and after READY, and its exit code."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"spolia_{role}", "--model", str(model), "--log-level", "error", "--threads", "1"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(100):
        line = await process.stdout.readline() if until_ready else b""
        if until_ready:
            process.terminate()
        out, err = await process.communicate()
    return line, out + err, process.returncode


@pytest.mark.slow
async def test_processes_say_ready_and_end_well_or_say_why_they_cannot_start(model: Path, tmp_path: Path) -> None:
    prefill, decode, hopeless = await asyncio.gather(
        run_process("prefill", model, until_ready=True),
        run_process("decode", model, until_ready=True),
        run_process("decode", tmp_path, until_ready=False),
    )
    for role, (line, noise, code) in (("prefill", prefill), ("decode", decode)):
        assert line.startswith(f"READY {role} 127.0.0.1:".encode())
        assert (noise, code) == (b"", 0)
    assert hopeless[2] == 2
    assert b"config.json" in hopeless[1]
    assert b"Traceback" not in hopeless[1]
