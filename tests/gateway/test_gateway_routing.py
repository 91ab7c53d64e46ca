"""Laws of choosing nodes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from gateway_fakes import FINGERPRINT, MODEL, SECRET, record
from gateway_worlds import LAWFUL
from hypothesis import given
from hypothesis import strategies as st

from spolia.v1.directory_pb2 import NodeRecord
from spolia_core.ids import IdSpace
from spolia_core.prompt import Part, Prompt
from spolia_core.reuse import PREFIX_CHUNK_TOKENS, ReuseMode
from spolia_gateway.catalog import ModelKey
from spolia_gateway.routing import (
    QUEUED_REQUEST_TOKENS,
    Demand,
    order_decode_nodes,
    order_prefill_nodes,
    rendezvous,
)

IDS: IdSpace = ModelKey(MODEL, FINGERPRINT, "float32").id_space(SECRET, "t")
CHUNKS = [IDS.local([i]) for i in range(6)]
KEYS = st.binary(min_size=1, max_size=8)
NODE_IDS = st.lists(st.text("abcdef", min_size=1, max_size=4), min_size=1, max_size=8, unique=True)


def names(nodes: Sequence[NodeRecord]) -> list[str]:
    return [node.node_id for node in nodes]


@LAWFUL
@given(NODE_IDS, KEYS, st.randoms(use_true_random=False))
def test_order_does_not_depend_on_the_order_given(node_ids: list[str], key: bytes, rng: random.Random) -> None:
    nodes = [record(node_id) for node_id in node_ids]
    first = names(order_decode_nodes(nodes, Demand(key)))
    rng.shuffle(nodes)
    assert names(order_decode_nodes(nodes, Demand(key))) == first
    assert names(order_prefill_nodes(nodes, key)) == names(rendezvous(nodes, key))


@LAWFUL
@given(NODE_IDS, KEYS, st.data())
def test_every_node_is_ordered_exactly_once(node_ids: list[str], key: bytes, data: st.DataObject) -> None:
    nodes = [
        record(
            node_id,
            num_running=data.draw(st.integers(0, 9)),
            total_blocks=4,
            available_blocks=data.draw(st.integers(0, 4)),
            held=data.draw(st.sets(st.sampled_from(CHUNKS))),
        )
        for node_id in node_ids
    ]
    demand = Demand(key, dict.fromkeys(CHUNKS, 100), prefix_tokens=256)
    ordered = order_decode_nodes(nodes, demand)
    assert sorted(names(ordered)) == sorted(node_ids)
    full = [node.load.available_blocks == 0 for node in ordered]
    assert full == sorted(full)


@LAWFUL
@given(NODE_IDS, KEYS)
def test_a_node_that_leaves_moves_only_its_own_prompts(node_ids: list[str], key: bytes) -> None:
    nodes = [record(node_id) for node_id in node_ids]
    ranked = names(rendezvous(nodes, key))
    for leaving in node_ids:
        rest = [node for node in nodes if node.node_id != leaving]
        assert names(rendezvous(rest, key)) == [name for name in ranked if name != leaving]


def test_rendezvous_spreads_prompts_evenly() -> None:
    nodes = [record(f"node-{i}") for i in range(4)]
    first = Counter(rendezvous(nodes, bytes([i, j]))[0].node_id for i in range(40) for j in range(25))
    assert min(first.values()) > 180  # 250 each on average


def test_the_node_that_holds_more_of_the_prompt_wins() -> None:
    demand = Demand(b"k", {CHUNKS[0]: 200, CHUNKS[1]: 300})
    nodes = [record("a", held=[CHUNKS[0]]), record("b", held=[CHUNKS[1]]), record("c"), record("d", held=CHUNKS[:2])]
    assert names(order_decode_nodes(nodes, demand)) == ["d", "b", "a", "c"]


def test_chunks_of_other_prompts_count_for_nothing() -> None:
    demand = Demand(b"k", {CHUNKS[0]: 1000})
    nodes = [record("a", held=CHUNKS[1:]), record("b", held=[CHUNKS[0]])]
    assert names(order_decode_nodes(nodes, demand))[0] == "b"


def test_a_long_queue_outweighs_held_chunks() -> None:
    demand = Demand(b"k", {CHUNKS[0]: 3 * QUEUED_REQUEST_TOKENS})
    for busy, expected in ((2, "holder"), (4, "idle")):
        nodes = [record("holder", held=[CHUNKS[0]], num_waiting=busy), record("idle")]
        assert names(order_decode_nodes(nodes, demand))[0] == expected


@LAWFUL
@given(KEYS)
def test_without_anything_held_the_shorter_queue_wins(key: bytes) -> None:
    nodes = [record("a", num_running=2, num_waiting=1), record("b", num_running=1), record("c", num_waiting=2)]
    assert names(order_decode_nodes(nodes, Demand(key))) == ["b", "c", "a"]


def test_own_requests_count_where_the_published_load_is_behind() -> None:
    nodes = [record("a"), record("b", num_running=1)]
    assert names(order_decode_nodes(nodes, Demand(b"k"), {"a": 3})) == ["b", "a"]
    # A published load that already has them is not counted twice.
    nodes = [record("a", num_running=3), record("b", num_running=4)]
    assert names(order_decode_nodes(nodes, Demand(b"k"), {"a": 3})) == ["a", "b"]


@LAWFUL
@given(KEYS)
def test_an_exact_prefix_keeps_its_node_until_that_is_much_busier(key: bytes) -> None:
    nodes = [record(f"n{i}") for i in range(4)]
    demand = Demand(key, prefix_tokens=4 * PREFIX_CHUNK_TOKENS)
    home = order_decode_nodes(nodes, demand)[0]
    home.load.num_running = 3
    assert order_decode_nodes(nodes, demand)[0].node_id == home.node_id
    home.load.num_running = 5
    assert order_decode_nodes(nodes, demand)[0].node_id != home.node_id


def test_prefill_hints_go_to_the_fewest_queued_tokens() -> None:
    nodes = [record("a", queued_tokens=50), record("b", queued_tokens=10), record("c", queued_tokens=30)]
    assert names(order_prefill_nodes(nodes, b"k")) == ["b", "c", "a"]
    assert names(order_prefill_nodes(nodes, b"k", {"b": 100})) == ["c", "a", "b"]


def linked(*chunks: int) -> Prompt:
    return Prompt(tuple(Part((c,) * 8, CHUNKS[c]) for c in chunks))


def test_linked_prompts_of_the_same_chunks_share_their_affinity() -> None:
    one, other = (Demand.of(linked(*order), ReuseMode.LINKED, IDS) for order in ((0, 1, 2), (2, 0, 1)))
    assert one.affinity == other.affinity
    assert one.chunk_tokens == {CHUNKS[c]: 8 for c in (0, 1, 2)}
    assert Demand.of(linked(0, 1), ReuseMode.LINKED, IDS).affinity != one.affinity


def test_exact_prompts_with_one_head_share_their_affinity() -> None:
    head = list(range(PREFIX_CHUNK_TOKENS))
    one = Demand.of(Prompt.live([*head, 5]), ReuseMode.EXACT, IDS)
    other = Demand.of(Prompt.live([*head, 6, 7]), ReuseMode.EXACT, IDS)
    assert one.affinity == other.affinity == next(IDS.prefix_chain(head))
    assert Demand.of(Prompt.live([9, *head]), ReuseMode.EXACT, IDS).affinity != one.affinity
    assert (one.prefix_tokens, one.chunk_tokens) == (PREFIX_CHUNK_TOKENS, {})


def test_a_prompt_shorter_than_a_prefix_block_is_known_by_all_of_it() -> None:
    demands = [Demand.of(Prompt.live(ids), ReuseMode.EXACT, IDS) for ids in ([1, 2], [1, 2], [1, 3])]
    assert demands[0] == demands[1]
    assert demands[0].affinity != demands[2].affinity
    assert demands[0].prefix_tokens == 0
