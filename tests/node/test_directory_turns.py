"""A directory at several addresses: the next is tried when one fails, the one that answers is kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from store_worlds import eventually, soon

from spolia.v1.directory_pb2 import NODE_ROLE_DECODE, NodeRecord, RegisterResponse, WatchResponse
from spolia.v1.directory_pb2_grpc import DirectoryServiceServicer, add_DirectoryServiceServicer_to_server
from spolia_bench.free_port import free_port
from spolia_node.channels import ChannelPool
from spolia_node.config import NodeConfig
from spolia_node.directory_turns import DirectoryTurns
from spolia_node.membership import ANSWER_TIMEOUT_S, ClusterView, Registration
from spolia_node.server import NodeServer

RECORD = NodeRecord(node_id="d1", role=NODE_ROLE_DECODE, address="localhost:1")


class FakeDirectory(DirectoryServiceServicer):
    """Lists who registered here."""

    def __init__(self, port: int = 0) -> None:
        self.server = NodeServer(NodeConfig(port=port), "kvstore")
        self.nodes: dict[str, NodeRecord] = {}
        self.num_watches = 0
        self.changed = asyncio.Event()

    async def Register(self, request_iterator: Any, context: Any) -> AsyncIterator[RegisterResponse]:
        node_id = ""
        try:
            async for request in request_iterator:
                node_id = request.record.node_id
                self.nodes[node_id] = request.record
                self._say()
                yield RegisterResponse(lease_ms=300)
        finally:
            self.nodes.pop(node_id, None)
            self._say()

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[WatchResponse]:
        self.num_watches += 1
        while True:
            changed = self.changed
            yield WatchResponse(nodes=self.nodes.values())
            await changed.wait()

    def _say(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


@asynccontextmanager
async def fake_directory(port: int = 0) -> AsyncIterator[FakeDirectory]:
    directory = FakeDirectory(port)
    add = partial(add_DirectoryServiceServicer_to_server, directory)
    directory.server.add(add, "spolia.v1.DirectoryService")
    await directory.server.start()
    try:
        yield directory
    finally:
        await directory.server.stop_at_once()


@asynccontextmanager
async def member(addresses: str) -> AsyncIterator[tuple[Registration, ClusterView]]:
    """A node that registers at some of `addresses`, and its view."""
    channels = ChannelPool(16 << 20)
    registration = Registration(channels, addresses, lambda: RECORD)
    view = ClusterView(channels, addresses, [NODE_ROLE_DECODE])
    registration.start()
    view.start()
    try:
        yield registration, view
    finally:
        await registration.stop()
        await view.stop()
        await channels.close()


def sees_itself(view: ClusterView) -> bool:
    return view.reachable and [record.node_id for record in view.nodes(NODE_ROLE_DECODE)] == ["d1"]


def test_one_address_is_waited_for_longer_and_longer() -> None:
    turns = DirectoryTurns("a:1")
    assert [(turns.address, turns.failed()) for _ in range(6)] == [
        ("a:1", wait_s) for wait_s in (0.1, 0.2, 0.4, 0.8, 1.6, 2.0)
    ]
    turns.answered()
    assert turns.failed() == 0.1


def test_several_addresses_are_tried_at_once_and_waited_for_after_a_round() -> None:
    turns = DirectoryTurns("a:1, b:2,c:3")
    tried = [(turns.address, turns.failed()) for _ in range(7)]
    assert [address for address, _ in tried] == ["a:1", "b:2", "c:3", "a:1", "b:2", "c:3", "a:1"]
    assert [wait_s for _, wait_s in tried] == [0, 0, 0.1, 0, 0, 0.2, 0]
    for _ in range(3):  # each answers and fails at once: a round still has its wait
        turns.answered()
        tried.append((turns.address, turns.failed()))
    assert [wait_s for _, wait_s in tried[-3:]] == [0, 0.1, 0]


async def test_a_node_finds_the_directory_at_whichever_address_it_is() -> None:
    async with (
        fake_directory() as directory,
        member(f"127.0.0.1:1,{directory.server.address}") as (registration, view),
    ):
        await registration.wait_registered(soon())
        await view.wait_for(sees_itself, soon())


async def test_when_the_directory_dies_the_next_address_takes_over_and_is_kept() -> None:
    async with fake_directory(port := free_port()) as first, fake_directory() as second:
        addresses = f"{first.server.address},{second.server.address}"
        async with member(addresses) as (registration, view):
            await view.wait_for(sees_itself, soon())
            assert "d1" in first.nodes
            assert not second.nodes
            started = asyncio.get_running_loop().time()
            await first.server.stop_at_once()
            await eventually(lambda: "d1" in second.nodes and second.num_watches == 1)
            await view.wait_for(sees_itself, soon())
            assert asyncio.get_running_loop().time() - started < ANSWER_TIMEOUT_S, (
                "the first one's answer is not waited for"
            )
            await registration.wait_registered(soon())  # the answer to it may still be on its way
            async with fake_directory(port) as again:
                await asyncio.sleep(0.3)
                assert not again.nodes, "one that answers is not left"
                await second.server.stop_at_once()
                await eventually(lambda: "d1" in again.nodes)
                await view.wait_for(sees_itself, soon())


@pytest.mark.parametrize("addresses", ["a:1,b", "a:1,", ",a:1", "a:1;b:2;c", " "])
def test_a_list_with_what_is_no_address_is_refused_by_name(addresses: str) -> None:
    with pytest.raises(Exception, match="directory must be") as caught:
        NodeConfig(directory=addresses)
    assert caught.value.field == "directory"  # type: ignore[attr-defined]  # a SpoliaError, which has one


def test_a_list_of_addresses_is_taken() -> None:
    assert NodeConfig(directory="a:1,b:2").directory == "a:1,b:2"
