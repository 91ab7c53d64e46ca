"""What stored prefix chunks cost: measured on the pass that made them, wherever that was; else not said."""

from __future__ import annotations

import pytest
from tiny_answers import ask
from tiny_cluster import TENANT, WAIT_S, World, eventually, ids_of, tokens

from spolia_core.sampling import SamplingParams
from spolia_decode.node import DecodeNode
from spolia_node.deadline import Deadline
from spolia_node.store_client import StoreClient

PROMPT = tokens(270)


async def costs(node: DecodeNode, token_ids: list[int]) -> list[float]:
    """Seconds of each prefix chunk that is stored."""
    client = StoreClient.of(node.channels, node.view, node.config.directory)
    chain = list(ids_of(node.engine).prefix_chain(token_ids))
    entries = await client.lookup(TENANT, chain, b"", (), Deadline.after(WAIT_S))
    return [entry.info.compute_s for entry in entries if entry.HasField("info")]


@pytest.mark.parametrize("where", ["here", "at a prefill node"])
async def test_prefix_chunks_of_a_prompt_share_what_its_pass_took(world: World, where: str) -> None:
    await world.store()
    if where != "here":
        await world.prefill()
    node = await world.decode()
    answer = await ask(node, [PROMPT], SamplingParams(max_tokens=2))
    assert len(answer.report.nodes) == (1 if where == "here" else 2)
    await eventually(lambda: node.parts.publisher.num_pending == 0)
    first, second = await costs(node, PROMPT)
    assert 0 < first < 10
    assert second == first


async def test_a_block_that_decoding_completed_names_no_cost(world: World) -> None:
    await world.store()
    node = await world.decode()
    answer = await ask(node, [PROMPT[:120]], SamplingParams(max_tokens=20))
    await eventually(lambda: node.parts.publisher.num_pending == 0)
    assert await costs(node, PROMPT[:120] + answer.token_ids) == [0.0]
