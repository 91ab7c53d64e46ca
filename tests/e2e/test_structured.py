"""Constraints from the client to the model and back, through a decode node that dies in the middle."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tiny_cluster import World, a_world, tokens
from tiny_gateway import client_of

from spolia import AsyncClient, NotSupported, TokenIds
from spolia_core.reuse import FinishReason

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 60, "maxLength": 90},
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 2, "maxItems": 4},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
PROMPT = TokenIds(tuple(tokens(40)))


def check(text: str) -> None:
    value = json.loads(text)
    assert list(value) == ["name", "tags"]
    assert 60 <= len(value["name"]) <= 90
    assert 2 <= len(value["tags"]) <= 4


@pytest.fixture
async def world(tiny: Path) -> AsyncIterator[World]:
    async with a_world(tiny) as made:
        await made.store()
        await made.prefill()
        yield made


async def test_every_sample_keeps_its_schema_through_a_killed_decode_node(world: World) -> None:
    nodes = [await world.decode(), await world.decode()]
    async with client_of(world, "tenant") as client:
        whole = await client.generate([PROMPT], json_schema=SCHEMA, temperature=1.0, seed=3, n=4, max_tokens=200)
        assert [sample.finish_reason for sample in whole.samples] == [FinishReason.EOS] * 4
        for sample in whole.samples:
            check(sample.text)
        killed = None
        async with client.stream([PROMPT], json_schema=SCHEMA, temperature=1.0, seed=3, n=4, max_tokens=200) as stream:
            async for delta in stream:
                if killed is None and delta.token_index >= 20:
                    killed = next(node for node in nodes if node.batch.num_sequences)
                    await world.kill(killed)
            result = await stream.result()
    assert killed is not None
    survivor = next(node for node in nodes if node is not killed)
    assert {killed.config.node_id, survivor.config.node_id} <= set(result.reuse.nodes)
    for sample, before in zip(result.samples, whole.samples, strict=True):
        check(sample.text)
        assert sample.finish_reason is FinishReason.EOS
        assert sample.token_ids[:20] == before.token_ids[:20]


async def test_a_client_is_told_what_is_wrong_with_a_constraint(world: World) -> None:
    await world.decode()
    async with client_of(world, "tenant") as client:
        await _refused(
            client, "sampling.json_schema", "uniqueItems", json_schema={"type": "array", "uniqueItems": True}
        )
        await _refused(client, "sampling.regex", "look-around", regex="a(?=b)")
        answer = await client.generate([PROMPT], choices=["yes", "no"])
        assert answer.text in ("yes", "no")


async def _refused(client: AsyncClient, field: str, said: str, **options: object) -> None:
    with pytest.raises(NotSupported, match=said) as caught:
        await client.generate([PROMPT], **options)  # type: ignore[arg-type]  # one of the constraints
    assert caught.value.field == field
