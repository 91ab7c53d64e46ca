"""GET /cluster: what GetCluster says, as JSON."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from spolia.v1.directory_pb2 import NodeRecord
from spolia_gateway.http.caller import Operating
from spolia_gateway.http.front_door import Front
from spolia_gateway.http.message_json import message_json

router = APIRouter()


@router.get("/cluster")
async def cluster(front: Front, operator: Operating, response: Response) -> dict[str, Any]:
    """The nodes, how busy they are and what they hold: the answer of gRPC's GetCluster, field by field. Of the chunks
    a node holds there are the numbers, not the ids. For operators' keys.
    """
    response.headers["cache-control"] = "no-store"
    found = front.gateway.get_cluster()
    told = message_json(found, without=("nodes",))
    return told | {"nodes": [_node(record) for record in found.nodes]}


def _node(record: NodeRecord) -> dict[str, Any]:
    told = message_json(record, without=("held_chunks", "held_prefixes"))
    return told | {
        "num_held_chunks": len(record.held_chunks),
        "num_held_prefixes": len(record.held_prefixes),
    }
