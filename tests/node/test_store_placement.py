"""Where chunks belong: the same on every node, evenly, and little moves when stores come and go."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from spolia.v1.directory_pb2 import NODE_ROLE_KVSTORE, NodeRecord
from spolia_node.channels import ChannelPool
from spolia_node.membership import ClusterView
from spolia_node.store_address import StoreAddress, known_stores, stores_at
from spolia_node.store_placement import in_order, open_stores

STORES = [StoreAddress(f"kvstore-{number}", f"host:{7000 + number}") for number in range(5)]
IDS = [random.Random(number).randbytes(32) for number in range(2000)]


def homes(stores: Sequence[StoreAddress]) -> list[str]:
    return [in_order(chunk_id, stores)[0].node_id for chunk_id in IDS]


def test_the_order_depends_on_the_id_and_the_node_ids_alone() -> None:
    shuffled = random.Random(1).sample(STORES, len(STORES))
    moved = [StoreAddress(store.node_id, "elsewhere:1") for store in STORES]
    for chunk_id in IDS[:50]:
        names = [store.node_id for store in in_order(chunk_id, STORES)]
        assert names == [store.node_id for store in in_order(chunk_id, shuffled)]
        assert names == [store.node_id for store in in_order(chunk_id, moved)]
        assert sorted(names) == [store.node_id for store in STORES]


def test_the_order_never_changes_between_releases() -> None:
    assert [store.node_id[-1] for store in in_order(bytes(32), STORES)] == ["0", "3", "2", "1", "4"]


def test_chunks_spread_evenly() -> None:
    counts = Counter(homes(STORES))
    assert len(counts) == 5
    assert max(counts.values()) < 1.25 * len(IDS) / 5


def test_when_a_store_leaves_only_its_own_chunks_move_and_each_to_its_next() -> None:
    before, after = homes(STORES), homes(STORES[1:])
    for chunk_id, old, new in zip(IDS, before, after, strict=True):
        assert new == (old if old != STORES[0].node_id else in_order(chunk_id, STORES)[1].node_id)


def test_closed_stores_are_left_out_unless_all_are() -> None:
    closed = [StoreAddress(store.node_id, store.address, is_open=False) for store in STORES]
    assert open_stores([*closed[:2], *STORES[2:]]) == STORES[2:]
    assert open_stores(closed) == closed


async def test_a_view_closes_draining_and_dead_stores_and_the_directory_stands_in_for_none() -> None:
    channels = ChannelPool(16 << 20)
    view = ClusterView(channels, "a:1", [NODE_ROLE_KVSTORE])
    stores = known_stores(view, "a:1,b:2")
    assert stores() == stores_at("a:1,b:2") == [StoreAddress("", "a:1"), StoreAddress("", "b:2")]
    records = [
        NodeRecord(node_id=f"s{number}", role=NODE_ROLE_KVSTORE, address=f"h:{number}", draining=number == 3)
        for number in (1, 2, 3)
    ]
    view._take({record.node_id: record for record in records})
    view.mark_dead("s1")
    assert [(store.node_id, store.is_open) for store in stores()] == [("s1", False), ("s2", True), ("s3", False)]
    view._take({"new": NodeRecord(node_id="new", role=NODE_ROLE_KVSTORE, address="h:1"), "s1": records[0]})
    assert stores() == [StoreAddress("new", "h:1"), *[s for s in stores() if s.address != "h:1"]]
    assert known_stores(None, "")() == []
    await channels.close()
