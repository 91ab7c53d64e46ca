"""Who should do the work: pure functions over what nodes publish.

A decode node costs what it would have to compute plus what stands before us in its queue, both in tokens: the bytes of
KV and the time to compute them are in proportion to these, so holding a document of 500 tokens is worth waiting for 500
others. Costs that are equal are decided by rendezvous hashing (Thaler and Ravishankar 1998): every gateway replica
ranks the nodes alike for one prompt, and a node that leaves moves only its own prompts.

What nodes publish is up to a heartbeat old. A choice that was right a second ago costs time and nothing else: the node
looks for itself, and brings or computes what it lacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from blake3 import blake3

from spolia.v1 import directory_pb2 as pb
from spolia_core.ids import IdSpace, pack_token_ids
from spolia_core.prompt import Prompt
from spolia_core.reuse import PREFIX_CHUNK_TOKENS, ReuseMode

QUEUED_REQUEST_TOKENS = 128
"""Prompt tokens that one more request at a node is worth, its own prompt left out: it decodes beside ours.

One prefix block: a node that holds a block of the prompt may be one request busier than its peers and still be chosen.
"""


@dataclass(frozen=True, slots=True)
class Demand:
    """What routing needs to know of a prompt.

    `chunk_tokens` maps the local chunks to their lengths; `prefix_chain` holds the ids of the blocks that an exact
    prefix could cover, first to last; prompts with equal `affinity` should land on the same node.
    """

    affinity: bytes
    chunk_tokens: Mapping[bytes, int] = field(default_factory=dict)
    prefix_chain: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, prompt: Prompt, mode: ReuseMode, ids: IdSpace) -> Demand:
        """LINKED prompts are known by their chunks in any order, others by the block of tokens they begin with.

        Of a LINKED prompt the prefix ends at its first document: what stands behind one is no prefix of anything.
        `ids` are those of the tenant that asks, which also names the prefix; chunks keep the ids they have.
        """
        chunk_tokens = {part.chunk_id: len(part.token_ids) for part in prompt.parts if part.chunk_id is not None}
        if mode is ReuseMode.LINKED and chunk_tokens:
            head = [token for part in takewhile(lambda p: p.chunk_id is None, prompt.parts) for token in part.token_ids]
            return cls(b"".join(sorted(chunk_tokens)), chunk_tokens, tuple(ids.prefix_chain(head)))
        chain = tuple(ids.prefix_chain(prompt.token_ids))
        return cls(chain[0] if chain else pack_token_ids(prompt.token_ids), prefix_chain=chain)


def order_decode_nodes(
    nodes: Sequence[pb.NodeRecord], demand: Demand, in_flight: Mapping[str, int] | None = None
) -> list[pb.NodeRecord]:
    """Decode nodes, best first.

    `in_flight` counts this gateway's own requests by node id: published load is up to a heartbeat old, and a burst
    must not fall on one node. Nodes without an available block come last, since they would answer that they are busy.
    """
    own = in_flight or {}

    def cost(rank: int, node: pb.NodeRecord) -> tuple[bool, int, bool, int]:
        full = node.load.total_blocks > 0 and node.load.available_blocks == 0
        # A node that says nothing of prefixes, as older releases do, may hold what it was sent before. One that says
        # that it holds as much is the better choice.
        presumed = rank == 0 and not node.held_prefixes and bool(demand.prefix_chain)
        prefix = len(demand.prefix_chain) * PREFIX_CHUNK_TOKENS if presumed else held_prefix_tokens(node, demand)
        held = prefix + held_chunk_tokens(node, demand)
        return full, queued_tokens(node.load, own.get(node.node_id, 0)) - held, presumed, rank

    ranked = enumerate(rendezvous(nodes, demand.affinity))
    return [node for _, node in sorted(ranked, key=lambda item: cost(*item))]


def held_chunk_tokens(node: pb.NodeRecord, demand: Demand) -> int:
    """Tokens of the prompt's local chunks that a node says it holds."""
    if not demand.chunk_tokens:
        return 0
    return sum(demand.chunk_tokens[chunk_id] for chunk_id in demand.chunk_tokens.keys() & node.held_chunks)


def held_prefix_tokens(node: pb.NodeRecord, demand: Demand) -> int:
    """Tokens of the longest leading run of the prompt's prefix blocks that a node says it holds.

    A block behind a gap is of no use: it can only be read behind all before it.
    """
    if not demand.prefix_chain:
        return 0
    held = set(demand.prefix_chain).intersection(node.held_prefixes)
    return sum(PREFIX_CHUNK_TOKENS for _ in takewhile(held.__contains__, demand.prefix_chain))


def queued_tokens(load: pb.NodeLoad, num_own: int = 0) -> int:
    """What stands before one more request at a decode node, in tokens.

    That is the prompts still to be prepared, as the node counts them, and a constant for each request that has a place.
    A node of an older release counts no tokens; there a waiting request is worth the constant. Requests of our own
    (`num_own`) that the published load cannot have yet are, too.
    """
    prompts = load.queued_tokens or load.num_waiting * QUEUED_REQUEST_TOKENS
    unseen = max(0, num_own - load.num_running - load.num_waiting)
    return prompts + (load.num_running + unseen) * QUEUED_REQUEST_TOKENS


def order_prefill_nodes(
    nodes: Sequence[pb.NodeRecord], affinity: bytes, assigned_tokens: Mapping[str, int] | None = None
) -> list[pb.NodeRecord]:
    """Prefill nodes by fewest tokens queued, ours (`assigned_tokens`, by node id) included; then by rendezvous."""
    own = assigned_tokens or {}
    return sorted(rendezvous(nodes, affinity), key=lambda n: n.load.queued_tokens + own.get(n.node_id, 0))


def rendezvous(nodes: Iterable[pb.NodeRecord], key: bytes) -> list[pb.NodeRecord]:
    """Nodes in the order that `key` prefers. Depends on node ids only, never on the order given."""
    return sorted(nodes, key=lambda node: blake3(node.node_id.encode() + b"\0" + key).digest(), reverse=True)
