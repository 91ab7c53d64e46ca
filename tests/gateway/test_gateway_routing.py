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
from spolia_gateway.routing import (
    QUEUED_REQUEST_TOKENS,
    Demand,
    held_prefix_tokens,
    order_decode_nodes,
    order_prefill_nodes,
    queued_tokens,
    rendezvous,
)
from spolia_gateway.served_models import ModelKey

IDS: IdSpace = ModelKey(MODEL, FINGERPRINT, "float32").id_space(SECRET, "t")
CHUNKS = [IDS.local([i]) for i in range(6)]
BLOCK = PREFIX_CHUNK_TOKENS
CHAIN = tuple(IDS.prefix_chain(range(4 * BLOCK)))
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
            prefixes=data.draw(st.sets(st.sampled_from(CHAIN))),
            queued_tokens=data.draw(st.integers(0, 4 * BLOCK)),
        )
        for node_id in node_ids
    ]
    demand = Demand(key, dict.fromkeys(CHUNKS, 100), CHAIN)
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
def test_where_no_prefixes_are_published_a_prompt_keeps_its_node_until_that_is_much_busier(key: bytes) -> None:
    nodes = [record(f"n{i}") for i in range(4)]
    demand = Demand(key, prefix_chain=CHAIN)
    home = order_decode_nodes(nodes, demand)[0]
    home.load.num_running = 3
    assert order_decode_nodes(nodes, demand)[0].node_id == home.node_id
    home.load.num_running = 5
    assert order_decode_nodes(nodes, demand)[0].node_id != home.node_id


@LAWFUL
@given(st.sets(st.integers(0, 3)))
def test_only_the_leading_run_of_a_prefix_counts(held: set[int]) -> None:
    leading = next((i for i in range(4) if i not in held), 4)
    node = record("a", prefixes=[CHAIN[i] for i in sorted(held, reverse=True)])
    assert held_prefix_tokens(node, Demand(b"k", prefix_chain=CHAIN)) == leading * BLOCK


@LAWFUL
@given(KEYS)
def test_the_node_that_holds_the_longest_prefix_wins_wherever_the_prompt_hashes(key: bytes) -> None:
    other = [IDS.prefix(None, [9])]
    nodes = [record("a", prefixes=other), record("b", prefixes=CHAIN[:3]), record("c", prefixes=CHAIN[:1])]
    assert names(order_decode_nodes(nodes, Demand(key, prefix_chain=CHAIN))) == ["b", "c", "a"]


@LAWFUL
@given(KEYS)
def test_a_node_that_says_it_holds_the_prefix_is_better_than_one_that_may(key: bytes) -> None:
    nodes = [record("silent"), record("holder", prefixes=CHAIN)]
    assert names(order_decode_nodes(nodes, Demand(key, prefix_chain=CHAIN))) == ["holder", "silent"]


@LAWFUL
@given(KEYS, st.integers(1, 4), st.integers(-1, 1))
def test_a_holder_loses_to_an_idle_node_when_its_queue_is_longer_than_what_it_holds(
    key: bytes, num_blocks: int, beyond: int
) -> None:
    other = [IDS.prefix(None, [9])]  # so that nothing is presumed of either
    queue = num_blocks * BLOCK + beyond
    nodes = [record("holder", prefixes=CHAIN[:num_blocks], queued_tokens=queue), record("idle", prefixes=other)]
    ordered = names(order_decode_nodes(nodes, Demand(key, prefix_chain=CHAIN)))
    expected = {-1: ["holder", "idle"], 0: names(rendezvous(nodes, key)), 1: ["idle", "holder"]}
    assert ordered == expected[beyond], "at the break-even it is rendezvous that decides"


@LAWFUL
@given(KEYS, st.integers(0, 3))
def test_the_same_break_even_holds_for_documents(key: bytes, num_running: int) -> None:
    demand = Demand(key, {CHUNKS[0]: 1000, CHUNKS[1]: 300})
    break_even = 1300 - num_running * QUEUED_REQUEST_TOKENS
    for queue, expected in ((break_even - 1, "holder"), (break_even + 1, "idle")):
        holder = record("holder", held=CHUNKS[:2], num_running=num_running, queued_tokens=queue)
        assert names(order_decode_nodes([holder, record("idle")], demand))[0] == expected


def test_a_linked_prompt_is_credited_for_its_prefix_and_its_documents() -> None:
    demand = Demand(b"k", {CHUNKS[0]: 100}, CHAIN[:1])
    nodes = [
        record("neither", prefixes=CHAIN[1:2]),
        record("document", held=[CHUNKS[0]], prefixes=CHAIN[1:2]),
        record("prefix", prefixes=CHAIN[:1]),
        record("both", held=[CHUNKS[0]], prefixes=CHAIN[:1]),
    ]
    assert names(order_decode_nodes(nodes, demand)) == ["both", "prefix", "document", "neither"]


def test_a_queue_is_its_published_tokens_and_what_decodes() -> None:
    def queue(own: int = 0, **load: int) -> int:
        return queued_tokens(record("a", **load).load, own)

    one = QUEUED_REQUEST_TOKENS
    assert queue() == 0
    assert queue(num_waiting=5, queued_tokens=40) == 40, "what waits is as long as it says"
    assert queue(num_running=2, num_waiting=5, queued_tokens=40) == 40 + 2 * one
    assert queue(num_running=2, num_waiting=5) == 7 * one, "an older release publishes no tokens"
    assert queue(own=3, num_running=1, num_waiting=1, queued_tokens=40) == 40 + 2 * one, "one is not published yet"
    assert queue(own=2, num_running=1, num_waiting=1, queued_tokens=40) == 40 + one


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


def test_a_linked_prompts_prefix_ends_at_its_first_document() -> None:
    system = tuple(range(2 * BLOCK + 5))
    prompt = Prompt((Part(system[:7]), Part(system[7:]), Part((1,) * BLOCK, CHUNKS[0]), Part((2,) * BLOCK)))
    assert Demand.of(prompt, ReuseMode.LINKED, IDS).prefix_chain == CHAIN[:2]
    assert len(Demand.of(prompt, ReuseMode.EXACT, IDS).prefix_chain) == 4
    at_once = Prompt((Part((1,) * BLOCK, CHUNKS[0]), Part(system)))
    assert Demand.of(at_once, ReuseMode.LINKED, IDS).prefix_chain == ()


def test_exact_prompts_with_one_head_share_their_affinity() -> None:
    head = list(range(PREFIX_CHUNK_TOKENS))
    one = Demand.of(Prompt.live([*head, 5]), ReuseMode.EXACT, IDS)
    other = Demand.of(Prompt.live([*head, 6, 7]), ReuseMode.EXACT, IDS)
    assert one.affinity == other.affinity == next(IDS.prefix_chain(head))
    assert Demand.of(Prompt.live([9, *head]), ReuseMode.EXACT, IDS).affinity != one.affinity
    assert (one.prefix_chain, one.chunk_tokens) == ((one.affinity,), {})
    long = Demand.of(Prompt.live(range(4 * BLOCK + 3)), ReuseMode.EXACT, IDS)
    assert (long.affinity, long.prefix_chain) == (CHAIN[0], CHAIN)


def test_a_prompt_shorter_than_a_prefix_block_is_known_by_all_of_it() -> None:
    demands = [Demand.of(Prompt.live(ids), ReuseMode.EXACT, IDS) for ids in ([1, 2], [1, 2], [1, 3])]
    assert demands[0] == demands[1]
    assert demands[0].affinity != demands[2].affinity
    assert demands[0].prefix_chain == ()
