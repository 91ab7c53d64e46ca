"""Which prefill nodes to try, in which order."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from spolia.v1.directory_pb2 import NODE_ROLE_PREFILL
from spolia_core.errors import Busy, DataCorrupt, DeadlineExceeded, SpoliaError, Unavailable
from spolia_node.deadline import Deadline
from spolia_node.logs import get_log
from spolia_node.membership import ClusterView

T = TypeVar("T")
log = get_log(__name__)


class PrefillNodes:
    """The prefill nodes of one model, as the directory lists them."""

    def __init__(self, view: ClusterView | None, fingerprint: bytes) -> None:
        self._view = view
        self._fingerprint = fingerprint

    def candidates(self, hints: Sequence[str]) -> list[str]:
        """Addresses, hinted ones first in the order of the hints, then the least loaded."""
        if self._view is None:
            return []
        nodes = [n for n in self._view.nodes(NODE_ROLE_PREFILL) if n.model.fingerprint == self._fingerprint]
        nodes.sort(key=lambda n: (n.address not in hints, n.load.queued_tokens, n.node_id))
        hinted = [address for address in hints if any(n.address == address for n in nodes)]
        return list(dict.fromkeys([*hinted, *(n.address for n in nodes)]))

    def name(self, address: str) -> str:
        """The node id behind an address, or the address where the directory does not know it."""
        known = self._view.nodes(NODE_ROLE_PREFILL, include_draining=True) if self._view else []
        return next((n.node_id for n in known if n.address == address), address)

    async def first_that_can(
        self,
        hints: Sequence[str],
        share: float,
        deadline: Deadline,
        work: Callable[[str, Deadline], Awaitable[T]],
    ) -> tuple[str, T] | None:
        """Tries nodes until one has done `work(address, deadline)`; its name and result. None when none could.

        A node gets `share` of the time that is left. Dead and late nodes are hidden for a while. What is wrong with the
        request itself is raised.
        """
        for address in self.candidates(hints):
            name = self.name(address)
            try:
                return name, await work(address, deadline.share(share))
            except (Unavailable, DeadlineExceeded, DataCorrupt) as error:
                self._lost(name, address, error)
            except Busy as error:
                log.info("prefill node is busy", node=name, error=str(error))
            deadline.check("prefill")
        return None

    def _lost(self, name: str, address: str, error: SpoliaError) -> None:
        log.warning("prefill node failed", node=name, address=address, error=str(error))
        if self._view is not None:
            self._view.mark_dead(name)
