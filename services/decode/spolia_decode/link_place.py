"""Where a context is linked: here, or on a prefill node that holds its chunks. Pure: costs and nodes come in.

Linking here is the rule: this node needs the reused KV anyway, and nothing has to travel. But a pass of many rows keeps
those that decode here waiting, slice after slice. A prefill node that has the chunks too can run it instead, and hand
over the live rows alone. What each way costs is what was measured of its parts:

    here      compute · (1 + sequences that wait meanwhile)
    there     queue + fetch of the chunks it lacks + compute + rows to hand over
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from spolia.v1.directory_pb2 import NodeRecord
from spolia_core.reuse import TokenSource
from spolia_worker.costs import NodeCosts


class LinkPlace(Enum):
    """Who runs the link pass."""

    DECODE = "decode"
    PREFILL = "prefill"


@dataclass(frozen=True, slots=True)
class LinkTask:
    """What is to be linked: `chunk_bytes` of each reused chunk, `row_bytes` of KV that a hand-off would move."""

    num_rows: int
    num_context_tokens: int
    chunk_bytes: Mapping[bytes, int]
    row_bytes: int


@dataclass(frozen=True, slots=True)
class Placed:
    """A decision. `node` is the prefill node, None for here; `predicted_s` what its way is expected to take."""

    place: LinkPlace
    node: NodeRecord | None
    predicted_s: float | None
    here_s: float | None = None
    """What linking here is expected to take."""

    def here(self) -> Placed:
        """The decision where the node could not."""
        return Placed(LinkPlace.DECODE, None, self.here_s, self.here_s)


def place_link(
    task: LinkTask, nodes: Sequence[NodeRecord], costs: NodeCosts, *, num_decoding: int, min_rows: int
) -> Placed:
    """The cheaper way. Here where `min_rows` or fewer are to be computed, or a cost is not known yet.

    `nodes` are prefill nodes that make the same chunks; `num_decoding` sequences would wait for a pass here.
    """
    compute_s = costs.compute_s(task.num_rows, task.num_context_tokens)
    here = Placed(LinkPlace.DECODE, None, compute_s, compute_s)
    if compute_s is None or task.num_rows <= min_rows or not nodes:
        return here
    offers = [(_cost_there(task, node, costs, compute_s), node.node_id, node) for node in nodes]
    known = [(cost, node_id, node) for cost, node_id, node in offers if cost is not None]
    if not known:
        return here
    cost, _, node = min(known, key=lambda offer: offer[:2])
    if cost < compute_s * (1 + num_decoding):
        return Placed(LinkPlace.PREFILL, node, cost, compute_s)
    return here


def _cost_there(task: LinkTask, node: NodeRecord, costs: NodeCosts, compute_s: float) -> float | None:
    """Seconds until the rows computed on a node are here; None where a part of it was never measured."""
    held = set(node.held_chunks)
    lacking = sum(size for chunk_id, size in task.chunk_bytes.items() if chunk_id not in held)
    queue_s = compute_s * node.load.queued_tokens / task.num_rows
    fetch_s = costs.fetch_s(TokenSource.HOST, lacking) if lacking else 0.0
    hand_over_s = costs.hand_over_s(task.row_bytes)
    if fetch_s is None:
        return None
    return queue_s + fetch_s + compute_s + hand_over_s
