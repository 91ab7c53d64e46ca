"""`spolia cluster`: who is there."""

from __future__ import annotations

from spolia.cli.options import DEFAULT_ADDRESS, Address, Json, Timeout
from spolia.cli.output import notes, print_columns, print_json
from spolia.client import Client
from spolia.results import Node

LOAD = ("running", "waiting", "held chunks")
LEDGER = ("blocks", "free", "referenced", "cached", "in transfer", "lent")
"""A pool's blocks, and how many are in each state."""

COLUMNS = ("node", "role", "address", "model", "profile", "linked", *LOAD, *LEDGER, "state")


def cluster(address: Address = DEFAULT_ADDRESS, timeout: Timeout = 10.0, as_json: Json = False) -> None:
    """Show the nodes, by which profile they serve LINKED, how busy they are, and the ledger of every pool.

    The ledger is how many blocks are in each state.
    """
    with Client(address, timeout_s=timeout) as client:
        found = client.cluster()
    if as_json:
        print_json(found)
        return
    nodes = sorted(found.nodes, key=lambda node: (node.role, node.node_id))
    print_columns(COLUMNS, *map(_cells, nodes))
    for refusal in dict.fromkeys(node.linked_refusal for node in nodes if node.linked_refusal):
        who = ", ".join(node.node_id for node in nodes if node.linked_refusal == refusal)
        notes().print(f"{who} refuse LINKED: {refusal}", markup=False)
    if not found.directory_reachable:
        notes().print("the directory cannot be reached; this is the last list the gateway knew")


def _cells(node: Node) -> tuple[str, ...]:
    load = (node.num_running, node.num_waiting, node.num_held_chunks)
    state = "draining" if node.draining else "serving"
    model = (node.model, node.profile, _linked(node))
    return (node.node_id, node.role, node.address, *model, *map(str, load), *_ledger(node), state)


def _linked(node: Node) -> str:
    """What the node's profile prescribes where LINKED is served; else whether force helps."""
    if node.linked_refusal:
        return "if forced" if node.can_force_linked else "no"
    return node.policy


def _ledger(node: Node) -> tuple[str, ...]:
    if not node.total_blocks:  # it has no pool
        return ("",) * len(LEDGER)
    in_each_state = (
        node.free_blocks,
        node.referenced_blocks,
        node.cached_blocks,
        node.in_transfer_blocks,
        node.lent_blocks,
    )
    return tuple(map(str, (node.total_blocks, *in_each_state)))
