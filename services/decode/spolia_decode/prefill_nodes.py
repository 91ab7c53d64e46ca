"""Which prefill nodes to try, in which order."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from spolia.v1.directory_pb2 import NODE_ROLE_PREFILL, NodeRecord
from spolia_core.errors import DataCorrupt, DeadlineExceeded, SpoliaError, Unavailable
from spolia_node.deadline import Deadline
from spolia_node.logs import get_log
from spolia_node.membership import ClusterView

LATE_S = 5.0
"""A node that has had so long is late; one that has had less may have been asked too late."""

T = TypeVar("T")
log = get_log(__name__)


class PrefillNodes:
    """The prefill nodes of one model and recipe, as the directory lists them; none where there is no directory."""

    def __init__(self, view: ClusterView | None, fingerprint: bytes, num_sink_tokens: int, share: float) -> None:
        """Nodes of another recipe (`num_sink_tokens`) make other chunks: they are left out.

        `share` is the part of what is left of a request's time that one node may take.
        """
        self._view = view
        self._made_alike = (fingerprint, num_sink_tokens)
        self._share = share

    def candidates(self, hints: Sequence[str]) -> list[NodeRecord]:
        """Hinted addresses first, in the order of the hints, then the least loaded."""
        if self._view is None:
            return []
        rank = {address: index for index, address in reversed(list(enumerate(hints)))}
        nodes = [
            node
            for node in self._view.nodes(NODE_ROLE_PREFILL)
            if (node.model.fingerprint, node.model.num_sink_tokens) == self._made_alike
        ]
        return sorted(nodes, key=lambda n: (rank.get(n.address, len(hints)), n.load.queued_tokens, n.node_id))

    def failed(self, node: NodeRecord, error: SpoliaError, given_s: float) -> None:
        """Notes that a node did not do what it had `given_s` seconds for.

        One that is dead, late, or answers nonsense is hidden for a while. A caller's short deadline is no sign of that.
        """
        log.warning("prefill node could not", node=node.node_id, address=node.address, error=repr(error))
        is_late = isinstance(error, DeadlineExceeded) and given_s >= LATE_S
        if self._view is not None and (is_late or isinstance(error, Unavailable | DataCorrupt)):
            self._view.mark_dead(node.node_id)

    def spread(self, sizes: Mapping[bytes, int], hints: Sequence[str]) -> list[list[bytes]]:
        """Chunks, by their tokens, over the nodes: share i is for candidate i; none without nodes.

        Longest first, each to the node that would be done with it soonest (Graham 1969).
        """
        queues = [node.load.queued_tokens for node in self.candidates(hints)]
        if not queues:
            return []
        shares: list[list[bytes]] = [[] for _ in queues]
        for chunk_id in sorted(sizes, key=lambda chunk_id: -sizes[chunk_id]):
            soonest = min(range(len(queues)), key=lambda index: queues[index])
            shares[soonest].append(chunk_id)
            queues[soonest] += sizes[chunk_id]
        return shares

    async def first_that_can(
        self, hints: Sequence[str], deadline: Deadline, work: Callable[[str, Deadline], Awaitable[T]], skip: int = 0
    ) -> tuple[str, T] | None:
        """Tries nodes until one has done `work(address, deadline)`; its node id and result. None when none could.

        Candidate `skip` is tried first, then those behind it, then those before it.
        Whatever a node answers, the next may do better, and this one can compute for itself: so no node's error is the
        request's. Dead and late nodes are hidden for a while. Raises `DeadlineExceeded` when no time is left.
        """
        candidates = self.candidates(hints)
        for node in candidates[skip:] + candidates[:skip]:
            share = deadline.share(self._share)
            given_s = share.remaining()
            try:
                return node.node_id, await work(node.address, share)
            except SpoliaError as error:
                self.failed(node, error, given_s)
            deadline.check("prefill")
        return None
