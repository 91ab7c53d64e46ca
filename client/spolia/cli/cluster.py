"""`spolia cluster`: who is there."""

from __future__ import annotations

from spolia.cli.options import DEFAULT_ADDRESS, Address, Json, Timeout
from spolia.cli.output import notes, print_columns, print_json
from spolia.client import Client
from spolia.results import Node

COLUMNS = ("node", "role", "address", "model", "running", "waiting", "free blocks", "held chunks", "state")


def cluster(address: Address = DEFAULT_ADDRESS, timeout: Timeout = 10.0, as_json: Json = False) -> None:
    """Show the nodes, how busy they are and what they hold."""
    with Client(address, timeout_s=timeout) as client:
        found = client.cluster()
    if as_json:
        print_json(found)
        return
    nodes = sorted(found.nodes, key=lambda node: (node.role, node.node_id))
    print_columns(COLUMNS, *map(_cells, nodes))
    if not found.directory_reachable:
        notes().print("the directory cannot be reached; this is the last list the gateway knew")


def _cells(node: Node) -> tuple[str, ...]:
    blocks = f"{node.available_blocks}/{node.total_blocks}" if node.total_blocks else ""
    load = (str(node.num_running), str(node.num_waiting), blocks, str(node.num_held_chunks))
    return (node.node_id, node.role, node.address, node.model, *load, "draining" if node.draining else "serving")
