"""Directories that share a backend know each other's nodes, and go on alone while it is away."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest
from captured_logs import captured_logs
from fake_backend import FakeBackend, FakeShared
from kvstore_worlds import HandClock, eventually

from spolia.v1.directory_pb2 import NODE_ROLE_DECODE, NodeRecord, RegisterRequest, WatchRequest
from spolia_core.errors import SpoliaError
from spolia_kvstore.backend import MemberLease
from spolia_kvstore.catalog import Catalog
from spolia_kvstore.directory import Directory
from spolia_kvstore.directory_server import DirectoryServer
from spolia_kvstore.embedded_backend import EmbeddedBackend

LONG_S, SHORT_S = 30.0, 1.5


def a_record(node_id: str, *, draining: bool = False) -> NodeRecord:
    return NodeRecord(node_id=node_id, role=NODE_ROLE_DECODE, address="localhost:1", draining=draining)


class Plaintext:
    """The context of a call without certificates."""

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}


class Site:
    """A directory with its own way to the shared backend."""

    def __init__(self, shared: FakeShared, lease_s: float) -> None:
        self.backend = FakeBackend(shared)
        self.left: list[str] = []
        self.directory = Directory(lease_s)
        self.server = DirectoryServer(self.directory, self.backend, on_left=self.left.append)

    def nodes(self) -> list[str]:
        return [record.node_id for record in self.directory.nodes()]


class Node:
    """A node's heartbeat stream to one directory."""

    def __init__(self, site: Site, node_id: str) -> None:
        self.node_id = node_id
        self._requests: asyncio.Queue[RegisterRequest] = asyncio.Queue()
        self._responses = site.server.Register(self._sent(), Plaintext())

    async def beat(self, *, draining: bool = False) -> None:
        await self._requests.put(RegisterRequest(record=a_record(self.node_id, draining=draining)))
        await asyncio.wait_for(anext(self._responses), 10)

    async def hang_up(self) -> None:
        await self._responses.aclose()

    async def falls_silent(self) -> None:
        """Beats no more; returns when the directory has ended the stream."""
        with suppress(SpoliaError, StopAsyncIteration):
            await asyncio.wait_for(anext(self._responses), 10)

    async def _sent(self) -> AsyncIterator[RegisterRequest]:
        while True:
            yield await self._requests.get()


async def registered(site: Site, node_id: str) -> Node:
    node = Node(site, node_id)
    await node.beat()
    return node


@pytest.fixture
def shared() -> FakeShared:
    return FakeShared(time.monotonic)


@pytest.fixture
async def open_site(shared: FakeShared) -> AsyncIterator[Callable[[float], Site]]:
    """Makes sites, not started, and closes them."""
    sites: list[Site] = []

    def make(lease_s: float = LONG_S) -> Site:
        sites.append(Site(shared, lease_s))
        return sites[-1]

    yield make
    for site in sites:
        await site.server.close()


@pytest.fixture
async def pair(open_site: Callable[[float], Site]) -> tuple[Site, Site]:
    sites = open_site(LONG_S), open_site(LONG_S)
    for site in sites:
        await site.server.start()
    return sites


async def test_each_sees_the_nodes_of_the_other_come_change_and_go(pair: tuple[Site, Site]) -> None:
    here, there = pair
    node = await registered(here, "a")
    await registered(there, "b")
    await eventually(lambda: here.nodes() == there.nodes() == ["a", "b"])
    await node.beat(draining=True)
    await eventually(lambda: there.directory.nodes()[0].draining)
    await node.hang_up()
    await eventually(lambda: here.nodes() == there.nodes() == ["b"])
    assert (here.left, there.left) == (["a"], ["a"]), "each is told once, so that each releases what it granted"


@pytest.mark.parametrize("ends_first", [True, False])
async def test_a_node_that_moves_to_another_directory_is_not_lost(
    shared: FakeShared, pair: tuple[Site, Site], ends_first: bool
) -> None:
    here, there = pair
    before = await registered(here, "a")
    await eventually(lambda: there.nodes() == ["a"])
    if ends_first:
        await before.hang_up()
    await registered(there, "a")
    if not ends_first:
        await eventually(lambda: shared.members["a"][0] == there.directory.newest_session())
        await before.hang_up()
        assert there.nodes() == ["a"]
    await eventually(lambda: here.nodes() == there.nodes() == ["a"])
    for _ in range(10):
        await asyncio.sleep(0.02)  # as long as several exchanges take
        assert here.nodes() == there.nodes() == ["a"]
    assert [record.node_id for _, record in there.directory.ours()] == ["a"]
    assert here.directory.ours() == []


async def test_a_node_that_falls_silent_leaves_all_directories_and_does_not_come_back(
    open_site: Callable[[float], Site],
) -> None:
    here, there = open_site(SHORT_S), open_site(SHORT_S)
    for site in (here, there):
        await site.server.start()
    with captured_logs():
        node = await registered(here, "a")
        await eventually(lambda: there.nodes() == ["a"])
        await node.falls_silent()
        await eventually(lambda: here.nodes() == there.nodes() == [])
        until = time.monotonic() + 1.5 * SHORT_S
        while time.monotonic() < until:
            assert here.nodes() == there.nodes() == []
            await asyncio.sleep(0.005)
    assert (here.left, there.left) == (["a"], ["a"])


async def test_while_the_backend_is_away_members_known_stay_and_new_ones_register(
    open_site: Callable[[float], Site],
) -> None:
    here, there = open_site(SHORT_S), open_site(SHORT_S)
    for site in (here, there):
        await site.server.start()
    nodes = [await registered(here, "a"), await registered(there, "b")]
    await eventually(lambda: here.nodes() == there.nodes() == ["a", "b"])
    here.backend.reachable = there.backend.reachable = False
    nodes.append(await registered(here, "c"))
    until = time.monotonic() + 2.5 * SHORT_S
    while time.monotonic() < until:
        for node in nodes:
            await node.beat()
        assert (here.nodes(), there.nodes()) == (["a", "b", "c"], ["a", "b"])
        await asyncio.sleep(SHORT_S / 8)
    for site in (here, there):
        site.backend.back()
    await eventually(lambda: here.nodes() == there.nodes() == ["a", "b", "c"])


async def test_what_left_while_the_backend_was_away_is_told_when_it_is_back(pair: tuple[Site, Site]) -> None:
    here, there = pair
    node = await registered(here, "a")
    await eventually(lambda: there.nodes() == ["a"])
    here.backend.reachable = False
    await node.hang_up()
    assert (here.nodes(), there.nodes()) == ([], ["a"])
    here.backend.back()
    await eventually(lambda: there.nodes() == [])
    assert here.nodes() == []


async def test_a_node_that_leaves_while_members_are_being_read_does_not_come_back_by_that(
    pair: tuple[Site, Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = pair
    node = await registered(here, "a")
    await eventually(lambda: there.nodes() == ["a"])
    members, has_left = here.backend.members, asyncio.Event()

    async def members_then_leave() -> list[MemberLease]:
        read = await members()
        if not has_left.is_set():
            has_left.set()
            await node.hang_up()
        return read

    monkeypatch.setattr(here.backend, "members", members_then_leave)
    await registered(there, "b")  # news, so that members are read
    await has_left.wait()
    for _ in range(20):
        assert "a" not in here.nodes()
        await asyncio.sleep(0.01)
    assert there.nodes() == ["b"]


async def test_a_directory_that_starts_knows_the_members_before_anybody_asks(
    pair: tuple[Site, Site], open_site: Callable[[float], Site]
) -> None:
    await registered(pair[0], "a")
    await eventually(lambda: pair[1].nodes() == ["a"])
    late = open_site(LONG_S)
    await late.server.start()
    assert late.nodes() == ["a"]


async def test_a_restored_member_that_does_not_register_again_leaves_when_its_lease_ends(
    shared: FakeShared, open_site: Callable[[float], Site]
) -> None:
    shared.members["a"] = (1, a_record("a").SerializeToString(), time.monotonic() + 0.2)
    site = open_site(SHORT_S)
    await site.server.start()
    assert site.nodes() == ["a"]
    with captured_logs():
        await eventually(lambda: site.nodes() == [])
    assert site.left == ["a"]


async def test_a_record_that_cannot_be_read_hides_no_other(
    shared: FakeShared, open_site: Callable[[float], Site]
) -> None:
    until = time.monotonic() + LONG_S
    shared.members = {
        "a": (1, b"\xff\xff", until),
        "b": (2, NodeRecord(node_id="b").SerializeToString(), until),
        "c": (3, a_record("c").SerializeToString(), until),
    }
    site = open_site(LONG_S)
    with captured_logs():
        await site.server.start()
        assert site.nodes() == ["c"]


async def test_sessions_grow_across_directories_also_while_the_backend_is_away(pair: tuple[Site, Site]) -> None:
    here, there = pair
    for _ in range(3):
        await registered(there, "b")
    await eventually(lambda: here.nodes() == ["b"])
    newest = here.directory.newest_session()
    here.backend.reachable = False
    await registered(here, "b")
    assert [session for session, _ in here.directory.ours()] == [newest + 1], "the node is here now, whoever forgets"


async def test_a_watcher_is_told_of_nodes_of_other_directories(pair: tuple[Site, Site]) -> None:
    here, there = pair
    snapshots = here.server.Watch(WatchRequest(), None)
    assert [record.node_id for record in (await anext(snapshots)).nodes] == []
    await registered(there, "b")
    assert [record.node_id for record in (await asyncio.wait_for(anext(snapshots), 10)).nodes] == ["b"]
    await snapshots.aclose()


async def test_nodes_register_also_where_the_disk_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog()

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(catalog, "next_number", full)
    for name in ("put", "renew", "remove"):
        monkeypatch.setattr(catalog.members, name, full)
    backend = EmbeddedBackend(catalog, HandClock())
    with captured_logs():
        sessions = [await backend.next_session() for _ in range(3)]
        assert sessions == sorted(set(sessions))
        assert await backend.renew_member("a", sessions[0], b"record", 10.0)
        assert [member.node_id for member in await backend.members()] == ["a"]
