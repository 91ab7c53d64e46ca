"""Which prefill nodes to try, in which order."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from spolia.v1.directory_pb2 import NODE_ROLE_PREFILL, NodeRecord
from spolia_core.errors import DataCorrupt, DeadlineExceeded, SpoliaError, Unavailable
from spolia_node.deadline import Deadline
from spolia_node.logs import get_log
from spolia_node.membership import ClusterView

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

    async def first_that_can(
        self, hints: Sequence[str], deadline: Deadline, work: Callable[[str, Deadline], Awaitable[T]]
    ) -> tuple[str, T] | None:
        """Tries nodes until one has done `work(address, deadline)`; its node id and result. None when none could.

        Whatever a node answers, the next may do better, and this one can compute for itself: so no node's error is the
        request's. Dead and late nodes are hidden for a while. Raises `DeadlineExceeded` when no time is left.
        """
        for node in self.candidates(hints):
            try:
                return node.node_id, await work(node.address, deadline.share(self._share))
            except SpoliaError as error:
                log.warning("prefill node could not", node=node.node_id, address=node.address, error=repr(error))
                if self._view is not None and isinstance(error, Unavailable | DeadlineExceeded | DataCorrupt):
                    self._view.mark_dead(node.node_id)
            deadline.check("prefill")
        return None
