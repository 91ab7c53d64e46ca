"""A node's place in the directory and its view of the others, through a real directory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from store_worlds import end_at_once, running_store, soon

from spolia.errors import DeadlineExceeded, InvalidRequest, error_from_rpc
from spolia.v1.directory_pb2 import (
    NODE_ROLE_DECODE,
    NODE_ROLE_KVSTORE,
    NODE_ROLE_PREFILL,
    NodeLoad,
    NodeRecord,
    RegisterRequest,
    WatchRequest,
)
from spolia.v1.directory_pb2_grpc import DirectoryServiceStub
from spolia_bench.free_port import free_port
from spolia_kvstore.node import KVStoreNode
from spolia_node import membership
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline
from spolia_node.membership import ClusterView, Registration

ROLES = (NODE_ROLE_DECODE, NODE_ROLE_PREFILL)


def make_record(node_id: str = "d1", role: int = NODE_ROLE_DECODE, **more: object) -> NodeRecord:
    return NodeRecord(node_id=node_id, role=role, address="localhost:1", **more)  # type: ignore[arg-type]  # fields differ in type


@pytest.fixture
async def node() -> AsyncIterator[KVStoreNode]:
    async with running_store() as running:
        yield running


@pytest.fixture
async def view(channels: ChannelPool, node: KVStoreNode) -> AsyncIterator[ClusterView]:
    async with watching(channels, node.server.address) as watched:
        yield watched


@asynccontextmanager
async def watching(channels: ChannelPool, address: str) -> AsyncIterator[ClusterView]:
    view = ClusterView(channels, address, ROLES)
    view.start()
    try:
        yield view
    finally:
        await view.stop()


@asynccontextmanager
async def registered(channels: ChannelPool, address: str, record: NodeRecord) -> AsyncIterator[Registration]:
    registration = Registration(channels, address, lambda: record)
    registration.start()
    try:
        await registration.wait_registered(soon())
        yield registration
    finally:
        await registration.stop()


def ids_in(view: ClusterView) -> list[str]:
    return [record.node_id for record in view.nodes(NODE_ROLE_DECODE)]


async def seen(view: ClusterView, *node_ids: str) -> None:
    await view.wait_for(lambda view: ids_in(view) == list(node_ids), soon())


async def test_a_node_is_seen_while_it_is_registered(
    channels: ChannelPool, node: KVStoreNode, view: ClusterView
) -> None:
    held = [bytes([number]) * 32 for number in (3, 1)]
    record = make_record(held_chunks=held, load=NodeLoad(num_running=2))
    async with registered(channels, node.server.address, record):
        await seen(view, "d1")
        assert view.nodes(NODE_ROLE_DECODE) == [record]
        assert view.nodes(NODE_ROLE_PREFILL) == view.nodes(NODE_ROLE_KVSTORE) == []
        assert view.reachable
    await seen(view)


async def test_a_touch_is_awaited_until_the_directory_has_the_record_as_it_is_now(
    channels: ChannelPool, node: KVStoreNode, view: ClusterView
) -> None:
    record = make_record()
    async with registered(channels, node.server.address, record) as registration:
        await seen(view, "d1")
        record.draining = True
        await asyncio.wait_for(registration.touch(), 10)
        assert [known.draining for known in node.directory.nodes([NODE_ROLE_DECODE])] == [True]
        await seen(view)
        assert [known.node_id for known in view.nodes(NODE_ROLE_DECODE, include_draining=True)] == ["d1"]
        registration.touch()  # may be left alone
    await asyncio.wait_for(registration.touch(), 10)


async def test_heartbeats_keep_a_node_past_its_lease(channels: ChannelPool) -> None:
    async with running_store(node_lease_ms=1500) as node, watching(channels, node.server.address) as view:
        async with registered(channels, node.server.address, make_record()):
            await seen(view, "d1")
            with pytest.raises(DeadlineExceeded):
                await view.wait_for(lambda view: ids_in(view) != ["d1"], Deadline.after(3.5))
        await seen(view)


async def test_a_node_whose_connection_breaks_vanishes_at_once(node: KVStoreNode, view: ClusterView) -> None:
    async with grpc.aio.insecure_channel(node.server.address) as channel:
        call = DirectoryServiceStub(channel).Register(None)
        await call.write(RegisterRequest(record=make_record()))
        response = await call.read()
        assert response.lease_ms == 10_000
        await seen(view, "d1")
        call.cancel()
        await seen(view)


async def test_a_silent_node_vanishes_when_its_lease_ends_and_is_told(channels: ChannelPool) -> None:
    async with (
        running_store(node_lease_ms=1500) as node,
        watching(channels, node.server.address) as view,
        grpc.aio.insecure_channel(node.server.address) as channel,
    ):
        call = DirectoryServiceStub(channel).Register(None)
        await call.write(RegisterRequest(record=make_record()))
        await call.read()
        await seen(view, "d1")
        await seen(view)
        with pytest.raises(grpc.RpcError) as caught:
            await call.read()
        assert isinstance(error_from_rpc(caught.value), DeadlineExceeded)


@pytest.mark.parametrize(
    ("field", "messages"),
    [
        ("record", [RegisterRequest()]),
        ("record.address", [RegisterRequest(record=NodeRecord(node_id="d1", role=NODE_ROLE_DECODE))]),
        ("record.node_id", [RegisterRequest(record=make_record("d1")), RegisterRequest(record=make_record("d2"))]),
    ],
)
async def test_a_bad_heartbeat_is_refused_by_field_and_the_node_leaves(
    node: KVStoreNode, field: str, messages: list[RegisterRequest]
) -> None:
    async with grpc.aio.insecure_channel(node.server.address) as channel:
        call = DirectoryServiceStub(channel).Register(iter(messages), timeout=10)
        with pytest.raises(grpc.RpcError) as caught:
            async for _ in call:
                pass
    error = error_from_rpc(caught.value)
    assert isinstance(error, InvalidRequest)
    assert error.field == field
    assert node.directory.nodes([NODE_ROLE_DECODE]) == []


async def test_a_node_that_registers_again_outlives_its_old_stream(
    channels: ChannelPool, node: KVStoreNode, view: ClusterView
) -> None:
    async with grpc.aio.insecure_channel(node.server.address) as channel:
        old = DirectoryServiceStub(channel).Register(None)
        await old.write(RegisterRequest(record=make_record()))
        await old.read()
        async with registered(channels, node.server.address, make_record(version="new")):
            old.cancel()
            await view.wait_for(lambda view: [r.version for r in view.nodes(NODE_ROLE_DECODE)] == ["new"], soon())
            async with registered(channels, node.server.address, make_record("d2")):
                await seen(view, "d1", "d2")


async def test_many_changes_make_few_snapshots_and_the_last_one_is_seen(
    channels: ChannelPool, node: KVStoreNode
) -> None:
    num_changes = 300
    async with grpc.aio.insecure_channel(node.server.address) as channel:
        stub = DirectoryServiceStub(channel)
        snapshots = stub.Watch(WatchRequest(roles=[NODE_ROLE_DECODE]), timeout=20)
        assert list((await snapshots.read()).nodes) == []
        call = stub.Register(None)
        started = asyncio.get_running_loop().time()
        for number in range(1, num_changes + 1):
            await call.write(RegisterRequest(record=make_record(load=NodeLoad(num_running=number))))
            await call.read()
        num_snapshots, last = 0, 0
        while last != num_changes:
            num_snapshots += 1
            last = (await snapshots.read()).nodes[0].load.num_running
        elapsed_s = asyncio.get_running_loop().time() - started
    assert num_snapshots <= elapsed_s * 10 + 1


async def test_a_change_of_other_roles_is_no_news(node: KVStoreNode) -> None:
    async with grpc.aio.insecure_channel(node.server.address) as channel:
        stub = DirectoryServiceStub(channel)
        snapshots = stub.Watch(WatchRequest(roles=[NODE_ROLE_DECODE]), timeout=20)
        assert list((await snapshots.read()).nodes) == []
        for record in (make_record("p1", NODE_ROLE_PREFILL), make_record("d1")):
            call = stub.Register(None)
            await call.write(RegisterRequest(record=record))
            await call.read()
        assert [known.node_id for known in (await snapshots.read()).nodes] == ["d1"]


async def test_the_view_outlives_the_directory_and_follows_its_successor_on_the_same_port(
    channels: ChannelPool,
) -> None:
    async with running_store(port=(port := free_port())) as first:
        address = first.server.address
        async with watching(channels, address) as view:
            leaver = Registration(channels, address, lambda: make_record("gone"))
            leaver.start()
            async with registered(channels, address, make_record("stays")) as registration:
                await seen(view, "gone", "stays")
                history: list[list[str]] = []
                following = asyncio.create_task(remember(view, history))
                await end_at_once(first)
                await view.wait_for(lambda view: not view.reachable, soon())
                await leaver.stop()
                assert ids_in(view) == ["gone", "stays"]
                async with running_store(port=port) as second:
                    await registration.wait_registered(soon())
                    await seen(view, "stays")
                    assert view.reachable
                    assert [r.node_id for r in second.directory.nodes([NODE_ROLE_DECODE])] == ["stays"]
                    following.cancel()
                    assert all("stays" in ids for ids in history), "a node that lives was never out of view"


async def remember(view: ClusterView, history: list[list[str]]) -> None:
    history.append(ids_in(view))
    while True:
        await view.wait_for(lambda view: ids_in(view) != history[-1], soon())
        history.append(ids_in(view))


async def test_a_node_marked_dead_is_hidden_until_it_registers_again(
    channels: ChannelPool, node: KVStoreNode, view: ClusterView
) -> None:
    async with registered(channels, node.server.address, make_record("other")):
        async with registered(channels, node.server.address, make_record("d1")):
            await seen(view, "d1", "other")
            view.mark_dead("d1")
            assert ids_in(view) == ["other"]
        await view.wait_for(lambda view: not view._dead_until, soon())
        async with registered(channels, node.server.address, make_record("d1")):
            await seen(view, "d1", "other")


async def test_a_node_marked_dead_that_goes_on_living_is_seen_again_after_a_while(
    channels: ChannelPool, node: KVStoreNode, view: ClusterView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "HIDE_DEAD_S", 2.0)
    async with registered(channels, node.server.address, make_record()) as registration:
        await seen(view, "d1")
        view.mark_dead("d1")
        await asyncio.wait_for(registration.touch(), 10)
        assert ids_in(view) == []
        await seen(view, "d1")


async def test_a_directory_that_is_not_there_yet_is_waited_for(channels: ChannelPool) -> None:
    port = free_port()
    address = f"127.0.0.1:{port}"
    registration = Registration(channels, address, make_record)
    registration.start()
    async with watching(channels, address) as view:
        with pytest.raises(DeadlineExceeded):
            await registration.wait_registered(Deadline.after(0.3))
        assert not registration.registered
        assert not view.reachable
        async with running_store(port=port):
            await registration.wait_registered(soon())
            await seen(view, "d1")
    await registration.stop()


async def test_waiting_for_a_view_that_does_not_come_is_deadline_exceeded(view: ClusterView) -> None:
    with pytest.raises(DeadlineExceeded):
        await view.wait_for(lambda view: bool(ids_in(view)), Deadline.after(0.05))


async def test_the_kvstore_registers_itself_and_says_when_it_drains(channels: ChannelPool, node: KVStoreNode) -> None:
    view = ClusterView(channels, node.server.address, [NODE_ROLE_KVSTORE])
    view.start()
    await view.wait_for(lambda view: bool(view.nodes(NODE_ROLE_KVSTORE)), soon())
    (record,) = view.nodes(NODE_ROLE_KVSTORE)
    assert (record.node_id, record.address) == (node.config.node_id, node.server.address)
    assert await node.server.drain()
    await view.wait_for(lambda view: not view.reachable, soon())
    await view.stop()
