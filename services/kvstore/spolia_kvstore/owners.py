"""Owners of claims and pins: a node's id, or "node_id/whatever the node tells its own apart by"."""

from __future__ import annotations


def belongs_to(owner: str, node_id: str) -> bool:
    """Whether the owner is this node, or something of it."""
    return owner == node_id or owner.startswith(f"{node_id}/")
