"""The stores a node knows: those that registered, and before one has, the processes that keep the directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spolia.v1.directory_pb2 import NODE_ROLE_KVSTORE
from spolia_node.addresses import addresses_in
from spolia_node.membership import ClusterView


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """A store."""

    node_id: str
    """Empty where only its address is known."""
    address: str
    is_open: bool = True
    """Objects may be put and looked for there. False while it drains, or for a while after it did not answer: then it
    is asked where every replica counts."""

    @property
    def name(self) -> str:
        """What tells it from other stores; the same on every node."""
        return self.node_id or self.address


Stores = Callable[[], Sequence[StoreAddress]]
"""Says which stores there are now."""


def stores_at(addresses: str) -> list[StoreAddress]:
    """Stores of which only the addresses are known, "host:port", several with commas between."""
    return [StoreAddress("", address) for address in addresses_in(addresses)]


def known_stores(view: ClusterView | None, directory: str) -> Stores:
    """The stores of `view`, which watches their role; those at the addresses of `directory` while it knows none."""

    def stores() -> list[StoreAddress]:
        return (_stores_of(view) if view is not None else []) or stores_at(directory)

    return stores


def _stores_of(view: ClusterView) -> list[StoreAddress]:
    """One for each address: a store that started again is listed twice for a while."""
    everyone = view.nodes(NODE_ROLE_KVSTORE, include_draining=True, include_dead=True)
    is_open = {record.node_id for record in view.nodes(NODE_ROLE_KVSTORE)}
    found: dict[str, StoreAddress] = {}
    for record in everyone:
        if record.address not in found or not found[record.address].is_open:
            found[record.address] = StoreAddress(record.node_id, record.address, record.node_id in is_open)
    return list(found.values())
