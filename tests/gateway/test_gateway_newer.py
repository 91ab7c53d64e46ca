"""A gateway between nodes and clients of a later release: what it does not know it passes on or passes over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from gateway_fakes import UTF8_ANSWER, FakeDecode, answers, record
from gateway_worlds import text_request, world
from newer_release import UNKNOWN_NUMBER, has_unknown_fields, newer

from spolia.errors import Unavailable
from spolia.v1 import common_pb2, decode_pb2, directory_pb2


async def says_more(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
    """The answer, between events of kinds that are yet to come, with reasons that are yet to come."""
    async for event in answers(node, request, context):
        yield newer(decode_pb2.DecodeServiceGenerateResponse())
        if event.HasField("finish"):
            misses = event.finish.reuse.misses.add(kind=common_pb2.CHUNK_KIND_LOCAL, num_tokens=3)
            misses.reason = UNKNOWN_NUMBER  # type: ignore[assignment]  # of no enum of this release
        yield newer(event)


async def test_an_answer_of_a_newer_decode_node_comes_through(model: Path) -> None:
    a = FakeDecode("a", says_more)
    async with world(model, decodes=[a]) as w:
        streamed = await w.generate(newer(text_request("the stones")))
        assert streamed.token_ids == list(UTF8_ANSWER.token_ids)
        assert streamed.finish is not None
        assert [miss.reason for miss in streamed.finish.reuse.misses] == [UNKNOWN_NUMBER]
        assert has_unknown_fields(streamed.finish), "a client of that release will understand"


async def test_nodes_that_say_more_of_themselves_are_used_and_those_of_unknown_roles_left_alone(model: Path) -> None:
    a = FakeDecode("a")
    async with world(model, decodes=[a]) as w:
        known = next(each for each in w.directory.nodes.values() if each.node_id == "a")
        stranger = record("s", address="127.0.0.1:1")
        stranger.role = UNKNOWN_NUMBER  # type: ignore[assignment]  # of no enum of this release
        w.directory.put(newer(known), newer(stranger), newer(record("d", draining=True)))
        await w.sees(lambda view: any(has_unknown_fields(each) for each in view.nodes(directory_pb2.NODE_ROLE_DECODE)))
        assert (await w.generate(text_request("the stones"))).token_ids == list(UTF8_ANSWER.token_ids)


async def test_a_draining_node_is_passed_over_and_does_not_count_as_dead(model: Path) -> None:
    async def drains(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        raise Unavailable("a is draining; ask another node")
        yield

    a, b = FakeDecode("a", drains), FakeDecode("b")
    async with world(model, decodes=[a, b]) as w:
        for _ in range(2):
            assert (await w.generate(text_request("the stones"))).token_ids == list(UTF8_ANSWER.token_ids)
        assert len(a.requests) == len(b.requests) == 2
        known = {each.node_id for each in w.node.cluster.nodes(directory_pb2.NODE_ROLE_DECODE)}
        assert known == {"a", "b"}
