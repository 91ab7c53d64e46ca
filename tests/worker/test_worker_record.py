"""What a node with an engine says of itself."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_answers import ask, calling, generate_request
from tiny_cluster import World, doc, eventually, held_engine, ids_of, tokens

from spolia_core.reuse import ReuseMode
from spolia_core.sampling import SamplingParams
from spolia_worker.record import MAX_HELD_IDS, shares_of

GREEDY = SamplingParams(max_tokens=4)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 10).map(lambda half: 2 * half))
@settings(derandomize=True, database=None)
def test_two_lists_share_a_limit_and_neither_goes_short_for_nothing(first: int, second: int, limit: int) -> None:
    ids = [bytes([i]) for i in range(60)]
    a, b = ids[:first], ids[30 : 30 + second]
    kept_a, kept_b = shares_of(a, b, limit)
    assert (kept_a, kept_b) == (a[: len(kept_a)], b[: len(kept_b)]), "the most recent ones are kept"
    assert len(kept_a) + len(kept_b) == min(limit, first + second), "no room is left unused"
    assert len(kept_a) >= min(first, limit // 2)
    assert len(kept_b) >= min(second, limit // 2)


async def test_a_record_names_resident_documents_and_prefix_blocks(world: World) -> None:
    decode = await world.decode()
    prompt, document = tokens(300), doc(60, 1)
    await ask(decode, [prompt], GREEDY)
    await ask(decode, [tokens(3), document, tokens(9, 2)], GREEDY, ReuseMode.LINKED)
    record, ids = decode.record(), ids_of(decode.engine)
    assert list(record.held_chunks) == [ids.local(document.token_ids)]
    assert set(record.held_prefixes) >= set(ids.prefix_chain(prompt))
    assert len(record.held_chunks) + len(record.held_prefixes) <= MAX_HELD_IDS
    assert record.load.queued_tokens == 0


async def test_a_decode_node_publishes_what_waits_and_what_is_prepared_and_is_not_here(world: World) -> None:
    decode = await world.decode(max_running=1)
    prompt, document = tokens(300), doc(60, 1)
    await ask(decode, [prompt], GREEDY)
    await ask(decode, [tokens(3), document], GREEDY, ReuseMode.LINKED)
    sent = [
        generate_request(decode, [prompt], GREEDY),  # two blocks of it are here
        generate_request(decode, [tokens(5), document, doc(40, 2)], GREEDY, ReuseMode.LINKED),  # one document is
        generate_request(decode, [tokens(200, 9)], GREEDY),
    ]
    queued = (300 - 256) + (5 + 40) + 200
    with held_engine(decode.thread) as release:
        async with calling(decode, sent[0]) as one, calling(decode, sent[1]) as two, calling(decode, sent[2]) as three:
            await eventually(lambda: decode.admission.num_waiting == 2)
            assert decode.record().load.queued_tokens == queued
            three.cancel()
            await eventually(lambda: decode.record().load.queued_tokens == queued - 200, "a cancel leaves the queue")
            release()
            await asyncio.gather(*(_read(call) for call in (one, two)))
    await eventually(lambda: decode.record().load.queued_tokens == 0)


async def _read(call: object) -> None:
    async for _ in call:  # type: ignore[attr-defined]  # a stream
        pass
