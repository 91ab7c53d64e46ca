"""Guards whose absence no answer shows: a cancel that stops the work, references, names and digests of chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from captured_logs import captured_logs
from prefill_fakes import a_front
from tiny_answers import Answer, ask, assert_same, calling, generate_request, send
from tiny_cluster import SECRET, TENANT, World, doc, eventually, fetch_one, ids_of, is_idle, stored, tokens

from spolia.v1.common_pb2 import ObjectInfo, Tier, TokenPart
from spolia.v1.kvstore_pb2 import LookupEntry
from spolia.v1.prefill_pb2 import PrefillResponse
from spolia_core.digests import digest
from spolia_core.errors import InvalidRequest, SpoliaError, Unavailable
from spolia_core.ids import SHARED_TENANT, tenant_key
from spolia_core.reuse import ChunkKind, MissReason, ReuseMode, TokenSource
from spolia_core.sampling import SamplingParams
from spolia_decode.chunk_gatherer import ChunkGatherer
from spolia_engine.kv_bytes import run_to_object
from spolia_engine.sealing import prefix_blocks
from spolia_kvstore.objects import ObjectKey
from spolia_node.deadline import Deadline
from spolia_node.store_client import FetchedChunk
from spolia_worker.chunk_fetch import ChunkFetcher

LINKED = ReuseMode.LINKED
GREEDY = SamplingParams(max_tokens=8)


async def test_a_cancelled_request_is_not_decoded_to_its_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.store()
    decode = await world.decode()
    num_steps = 0
    step = decode.engine.decoding.step_logits

    def counted(sequences: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        return step(sequences)

    monkeypatch.setattr(decode.engine.decoding, "step_logits", counted)
    async with calling(decode, generate_request(decode, [tokens(20)], SamplingParams(max_tokens=1400))) as call:
        for _ in range(5):
            await call.read()
    await eventually(lambda: is_idle(decode.engine.pool), "the sequence is not closed")
    assert num_steps < 1000, f"{num_steps} steps for a request cancelled after a few"


async def test_chunks_that_came_are_given_back_when_another_cannot(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The world checks at its end that nothing is held."""
    await world.store()
    await world.prefill()
    decode = await world.decode()
    documents = [doc(60, 1), doc(60, 2)]
    await ask(decode, [tokens(3), documents[0], tokens(9)], GREEDY, LINKED)
    gather = ChunkGatherer.gather

    async def gather_and_fail(self: ChunkGatherer, gathered: Any, *args: Any) -> None:
        await gather(self, gathered, *args)
        assert len(gathered.runs) == 2
        raise Unavailable("lost at the last moment")

    monkeypatch.setattr(ChunkGatherer, "gather", gather_and_fail)
    with pytest.raises(SpoliaError, match="last moment"):
        await ask(decode, [tokens(3), *documents, tokens(9)], GREEDY, LINKED)


async def test_a_request_names_chunks_of_its_tenant_and_of_shared_and_no_others(world: World) -> None:
    store = await world.store()
    await world.prefill()
    decode = await world.decode()
    document, live = doc(60, 1), tokens(9)

    async def ask_by(tenant_id: str, named: list[int] | tuple[int, ...]) -> tuple[Answer, bytes]:
        chunk_id = decode.engine.id_space(tenant_key(SECRET.encode(), tenant_id)).local(named)
        parts = [TokenPart(token_ids=document.token_ids, chunk_id=chunk_id), TokenPart(token_ids=live)]
        return await send(decode, generate_request(decode, [live], GREEDY, LINKED, parts=parts)), chunk_id

    expected = world.expect([document, live], GREEDY, LINKED)
    answer, chunk_id = await ask_by(SHARED_TENANT, document.token_ids)
    assert_same(answer, expected)
    assert answer.sources[TokenSource.COMPILED] == 60, "gone since the gateway looked: a prefill node makes it again"
    assert stored(store, chunk_id) is not None
    assert store.store.tiers.ram.find(ObjectKey(SHARED_TENANT, chunk_id)) is None, "only operators write what all read"
    assert_same((await ask_by(TENANT, document.token_ids))[0], expected)
    with captured_logs() as logs:
        for tenant_id, named in (("another", document.token_ids), (SHARED_TENANT, live)):
            with pytest.raises(InvalidRequest, match="not the id of these tokens"):
                await ask_by(tenant_id, named)
    refused = [entry["field"] for entry in logs if entry["event"].startswith("chunk id refused")]
    assert refused == ["parts[0].chunk_id"] * 2
    labels = {"service": "spolia.v1.DecodeService", "method": "Generate", "code": "INVALID_ARGUMENT"}
    await eventually(lambda: decode.server.metrics.value("spolia_rpc_requests_total", **labels) == 2)


@pytest.mark.parametrize("kind", [ChunkKind.LOCAL, ChunkKind.PREFIX], ids=lambda kind: kind.name)
async def test_an_object_that_is_another_chunk_is_a_digest_miss(world: World, kind: ChunkKind) -> None:
    """A store that answers with other bytes, digests and all, gets nothing into the pool."""
    await world.store()
    decode = await world.decode()
    core, ids = decode.engine, ids_of(decode.engine)
    asked, given = tokens(128, 1), tokens(128, 2)
    run = core.compile(ids.local(given), given)
    data = bytearray(run_to_object(run, core.meta(ids.local(given), ChunkKind.LOCAL, run)))
    core.pool.release(run.extent)

    class LyingStore:
        async def lookup(self, _tenant: str, chunk_ids: list[bytes], *_: Any) -> list[Any]:
            return [entry_of(data) for _ in chunk_ids]

        async def get(
            self, _tenant: str, chunk_ids: list[bytes], *_: Any, on_bytes: Any
        ) -> AsyncIterator[FetchedChunk]:
            for index, chunk_id in enumerate(chunk_ids):
                for num_bytes in (0, len(data)) if on_bytes else ():
                    on_bytes(index, entry_of(data).info, 0, memoryview(data)[:num_bytes])
                yield FetchedChunk(index, chunk_id, entry_of(data), None if on_bytes else bytearray(data), None)

    fetcher = ChunkFetcher(core, LyingStore())  # type: ignore[arg-type]  # has the methods that are called
    if kind is ChunkKind.LOCAL:
        chunk_id = ids.local(asked)
        assert await fetch_one(fetcher, core, chunk_id, len(asked)) is MissReason.DIGEST
    else:
        chunk_id = ids.prefix(None, asked)
        fetched = await fetcher.fetch_prefix("tenant", prefix_blocks([chunk_id]), Deadline.after(10))
        assert not fetched.runs
        assert fetched.misses == {chunk_id: MissReason.DIGEST}
    assert chunk_id not in core.resident


async def test_an_inline_chunk_is_checked_as_a_whole(world: World) -> None:
    """Frames that each match their digest, of an object that is not the one announced."""
    store = await world.store()
    good = await world.prefill()
    front, address = await a_front(world, good, swaps_bytes_between_good_frames)
    decode = await world.decode()
    await world.sees_prefill(decode, 2)
    await world.kill_store(store)
    parts = [tokens(3), doc(60, 1), tokens(9)]
    answer = await ask(decode, parts, GREEDY, LINKED, prefill_hints=[address])
    assert_same(answer, world.expect(parts, GREEDY, LINKED))
    assert front.num_calls == 1
    assert good.config.node_id in answer.report.nodes, "the next node must have been asked"


async def swaps_bytes_between_good_frames(responses: AsyncIterator[PrefillResponse]) -> AsyncIterator[PrefillResponse]:
    async for response in responses:
        if response.HasField("inline_frame"):
            frame = response.inline_frame
            frame.data = frame.data[:-4] + b"\0\0\0\x40"
            frame.digest = digest(frame.data)
        yield response


def entry_of(data: bytes | bytearray) -> Any:
    return LookupEntry(info=ObjectInfo(size_bytes=len(data)), tier=Tier.TIER_RAM)


@pytest.mark.parametrize(("num_prompt", "field"), [(20, "sampling.max_tokens"), (200, "parts")])
async def test_what_never_fits_is_refused_by_the_name_of_what_is_too_long(
    world: World, num_prompt: int, field: str
) -> None:
    decode = await world.decode(num_blocks=8)  # 128 tokens
    with pytest.raises(InvalidRequest) as caught:
        await ask(decode, [tokens(num_prompt)], SamplingParams(max_tokens=150))
    assert caught.value.field == field
    assert caught.value.limit == ("96 tokens" if field != "parts" else "8 blocks")
