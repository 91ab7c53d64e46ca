"""Who should do the work: pure functions over what nodes publish.

A decode node costs what it would have to compute plus what stands before us in its queue, both in tokens. Costs that
are equal are decided by rendezvous hashing (Thaler and Ravishankar 1998): every gateway replica ranks the nodes alike
for one prompt, so repeats meet the KV they left behind, and a node that leaves moves only its own prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from blake3 import blake3

from spolia.v1 import directory_pb2 as pb
from spolia_core.ids import IdSpace, pack_token_ids
from spolia_core.prompt import Prompt
from spolia_core.reuse import PREFIX_CHUNK_TOKENS, ReuseMode

QUEUED_REQUEST_TOKENS = 128
"""Prompt tokens that one more request in a node's queue is worth.

One prefix block: a node that holds a block of the prompt may be one request busier than its peers and still be chosen.
"""


@dataclass(frozen=True, slots=True)
class Demand:
    """What routing needs to know of a prompt.

    `chunk_tokens` maps the local chunks to their lengths; `prefix_tokens` is how much of the prompt an exact prefix
    could cover; prompts with equal `affinity` should land on the same node.
    """

    affinity: bytes
    chunk_tokens: Mapping[bytes, int] = field(default_factory=dict)
    prefix_tokens: int = 0

    @classmethod
    def of(cls, prompt: Prompt, mode: ReuseMode, ids: IdSpace) -> Demand:
        """LINKED prompts are known by their chunks in any order, others by the block of tokens they begin with."""
        chunk_tokens = {part.chunk_id: len(part.token_ids) for part in prompt.parts if part.chunk_id is not None}
        if mode is ReuseMode.LINKED and chunk_tokens:
            return cls(affinity=b"".join(sorted(chunk_tokens)), chunk_tokens=chunk_tokens)
        token_ids = prompt.token_ids
        first_block = token_ids[:PREFIX_CHUNK_TOKENS]
        affinity = next(ids.prefix_chain(first_block), None) or pack_token_ids(first_block)
        return cls(affinity=affinity, prefix_tokens=len(token_ids) // PREFIX_CHUNK_TOKENS * PREFIX_CHUNK_TOKENS)


def order_decode_nodes(
    nodes: Sequence[pb.NodeRecord], demand: Demand, in_flight: Mapping[str, int] | None = None
) -> list[pb.NodeRecord]:
    """Decode nodes, best first.

    `in_flight` counts this gateway's own requests by node id: published load is up to a heartbeat old, and a burst
    must not fall on one node. Exact prefixes are not published, so the node that rendezvous hashing prefers is taken to
    hold them. Nodes without an available block come last, since they would answer that they are busy.
    """
    own = in_flight or {}
    ranked = rendezvous(nodes, demand.affinity)

    def cost(rank: int, node: pb.NodeRecord) -> tuple[bool, int, int]:
        held = demand.chunk_tokens.keys() & node.held_chunks if demand.chunk_tokens else ()
        expected = sum(demand.chunk_tokens[chunk] for chunk in held)
        if rank == 0:
            expected += demand.prefix_tokens
        queued = max(node.load.num_running + node.load.num_waiting, own.get(node.node_id, 0))
        full = node.load.total_blocks > 0 and node.load.available_blocks == 0
        return full, queued * QUEUED_REQUEST_TOKENS - expected, rank

    return [node for _, node in sorted(enumerate(ranked), key=lambda item: cost(*item))]


def order_prefill_nodes(
    nodes: Sequence[pb.NodeRecord], affinity: bytes, assigned_tokens: Mapping[str, int] | None = None
) -> list[pb.NodeRecord]:
    """Prefill nodes by fewest tokens queued, ours (`assigned_tokens`, by node id) included; then by rendezvous."""
    own = assigned_tokens or {}
    return sorted(rendezvous(nodes, affinity), key=lambda n: n.load.queued_tokens + own.get(n.node_id, 0))


def rendezvous(nodes: Iterable[pb.NodeRecord], key: bytes) -> list[pb.NodeRecord]:
    """Nodes in the order that `key` prefers. Depends on node ids only, never on the order given."""
    return sorted(nodes, key=lambda node: blake3(node.node_id.encode() + b"\0" + key).digest(), reverse=True)
