"""Membership as a pure state machine: time is an argument."""

import pytest

from spolia.v1.directory_pb2 import NODE_ROLE_DECODE, NODE_ROLE_PREFILL, NodeLoad, NodeRecord
from spolia_core.errors import InvalidRequest
from spolia_kvstore.directory import MAX_HELD_CHUNKS, Directory, RemoteLease

BAD_ADDRESSES = (
    "",
    "localhost",
    ":1",
    "localhost:",
    "localhost:0",
    "localhost:65536",
    "::1:80",
    "a b:1",
    "[]:1",
    "x:１",
)


def make_node(node_id: str = "d1", role: int = NODE_ROLE_DECODE, **more: object) -> NodeRecord:
    return NodeRecord(node_id=node_id, role=role, address="localhost:1", **more)  # type: ignore[arg-type]  # fields differ in type


def ids_of(directory: Directory, roles: tuple[int, ...] = ()) -> list[str]:
    return [record.node_id for record in directory.nodes(roles)]


def test_a_node_stays_for_its_lease_after_the_last_heartbeat() -> None:
    directory = Directory(lease_s=3.0)
    directory.renew(1, make_node(), now=0.0)
    directory.renew(1, make_node(), now=2.0)
    assert directory.next_expiry() == 5.0
    directory.expire(4.9)
    assert ids_of(directory) == ["d1"]
    directory.expire(5.0)
    assert ids_of(directory) == []
    assert directory.next_expiry() is None


def test_who_leaves_is_named() -> None:
    directory = Directory(lease_s=3.0)
    directory.renew(1, make_node("a"), now=0.0)
    directory.renew(2, make_node("b"), now=1.0)
    assert directory.expire(2.0) == []
    assert directory.expire(3.0) == ["a"]
    assert directory.leave(1) == []
    assert directory.leave(2) == ["b"]


@pytest.mark.parametrize("address", ["localhost:1", "10.0.0.1:65535", "[::1]:80", "node-1.rack_2.example:7300"])
def test_addresses_that_can_be_connected_to_are_taken(address: str) -> None:
    directory = Directory(lease_s=3.0)
    directory.renew(1, NodeRecord(node_id="d1", role=NODE_ROLE_DECODE, address=address), 0.0)
    assert [record.address for record in directory.nodes()] == [address]


def test_only_changes_move_the_version() -> None:
    directory = Directory(lease_s=3.0)
    versions = []
    for step in (
        lambda: directory.renew(1, make_node(), 0.0),
        lambda: directory.renew(1, make_node(), 1.0),
        lambda: directory.renew(1, make_node(load=NodeLoad(num_running=1)), 1.0),
        lambda: directory.expire(1.0),
        lambda: directory.leave(2),
        lambda: directory.leave(1),
    ):
        step()
        versions.append(directory.version)
    assert versions == [1, 1, 2, 2, 2, 3]


def test_a_newer_session_takes_over_and_the_older_can_neither_remove_nor_renew() -> None:
    directory = Directory(lease_s=3.0)
    directory.renew(1, make_node(), 0.0)
    directory.renew(2, make_node(draining=True), 0.0)
    directory.leave(1)
    assert [record.draining for record in directory.nodes()] == [True]
    with pytest.raises(InvalidRequest, match="registered again"):
        directory.renew(1, make_node(), 0.0)
    directory.leave(2)
    assert ids_of(directory) == []


def test_nodes_are_filtered_by_role_and_ordered_by_id() -> None:
    directory = Directory(lease_s=3.0)
    for session, (node_id, role) in enumerate(
        (("b", NODE_ROLE_DECODE), ("a", NODE_ROLE_DECODE), ("c", NODE_ROLE_PREFILL))
    ):
        directory.renew(session, make_node(node_id, role), 0.0)
    assert ids_of(directory) == ["a", "b", "c"]
    assert ids_of(directory, (NODE_ROLE_PREFILL,)) == ["c"]


def test_held_chunks_are_kept_in_order_and_the_caller_keeps_its_record() -> None:
    directory = Directory(lease_s=3.0)
    held = [number.to_bytes(32, "big") for number in (3, 1, 2)]
    record = make_node(held_chunks=held)
    directory.renew(1, record, 0.0)
    record.Clear()
    assert list(directory.nodes()[0].held_chunks) == held


# What other directories keep


def remote(node_id: str, session: int, remaining_s: float = 3.0, **more: object) -> RemoteLease:
    return RemoteLease(make_node(node_id, **more), session, remaining_s)


def test_what_other_directories_keep_is_taken_over_and_leaves_when_they_name_it_no_more() -> None:
    directory = Directory(lease_s=3.0)
    directory.renew(1, make_node("ours"), now=0.0)
    assert directory.take_remote([remote("a", 2), remote("b", 3)], now=0.0) == []
    assert ids_of(directory) == ["a", "b", "ours"]
    assert directory.take_remote([remote("b", 3)], now=1.0) == ["a"]
    assert directory.take_remote([], now=1.0) == ["b"]
    assert ids_of(directory) == ["ours"]


def test_a_member_registered_here_stays_unless_it_registered_elsewhere_since() -> None:
    directory = Directory(lease_s=3.0)
    directory.renew(5, make_node("a"), now=0.0)
    for session in (4, 5):
        directory.take_remote([remote("a", session, draining=True)], now=0.0)
        assert [(session, record.draining) for session, record in directory.ours()] == [(5, False)]
    directory.take_remote([remote("a", 6, draining=True)], now=0.0)
    assert directory.ours() == []
    assert directory.nodes()[0].draining
    assert directory.leave(5) == [], "the stream that it left must not remove it"
    directory.renew(7, make_node("a"), now=0.0)
    assert [session for session, _ in directory.ours()] == [7], "it came back"


def test_a_lease_elsewhere_ends_when_it_says_and_renewals_are_no_change() -> None:
    directory = Directory(lease_s=3.0)
    directory.take_remote([remote("a", 1, remaining_s=2.0)], now=10.0)
    version = directory.version
    directory.take_remote([remote("a", 1, remaining_s=2.0)], now=11.0)
    assert (directory.version, directory.next_expiry()) == (version, 13.0)
    assert directory.expire(12.9) == []
    assert directory.expire(13.0) == ["a"]


def test_members_of_others_are_kept_while_nobody_can_say_that_they_are_gone() -> None:
    directory = Directory(lease_s=3.0)
    directory.renew(2, make_node("ours"), now=0.0)
    directory.take_remote([remote("a", 1, remaining_s=2.0), remote("b", 3, remaining_s=60.0)], now=0.0)
    directory.keep_remote(until=9.0)
    assert directory.expire(8.9) == ["ours"]
    assert directory.expire(9.0) == ["a"]
    assert directory.expire(60.0) == ["b"]


def test_the_newest_session_is_over_all_members() -> None:
    directory = Directory(lease_s=3.0)
    assert directory.newest_session() == 0
    directory.renew(2, make_node("a"), now=0.0)
    directory.take_remote([remote("b", 7)], now=0.0)
    assert directory.newest_session() == 7
    assert directory.leave(7) == ["b"]
    assert directory.newest_session() == 2


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("record.node_id", {"node_id": ""}),
        *(("record.address", {"address": address}) for address in BAD_ADDRESSES),
        ("record.role", {"role": 0}),
        ("record.role", {"role": 99}),
        ("record.held_chunks", {"held_chunks": [b"short"]}),
        ("record.held_chunks", {"held_chunks": [bytes(32)] * (MAX_HELD_CHUNKS + 1)}),
        ("record.held_prefixes", {"held_prefixes": [b"short"]}),
        ("record.held_prefixes", {"held_prefixes": [bytes(32)] * (MAX_HELD_CHUNKS + 1)}),
    ],
)
def test_a_bad_record_is_refused_by_field_and_changes_nothing(field: str, change: dict[str, object]) -> None:
    directory = Directory(lease_s=3.0)
    values = {"node_id": "d1", "role": NODE_ROLE_DECODE, "address": "localhost:1", **change}
    with pytest.raises(InvalidRequest) as caught:
        directory.renew(1, NodeRecord(**values), 0.0)  # type: ignore[arg-type]  # fields differ in type
    assert caught.value.field == field
    assert len(directory) == 0
