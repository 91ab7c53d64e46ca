"""Who may call what inside a cluster. Anything that is not here is refused."""

from __future__ import annotations

from collections.abc import Mapping

from grpc_reflection.v1alpha import reflection

from spolia.v1 import decode_pb2, directory_pb2, gateway_pb2, kvstore_pb2, prefill_pb2
from spolia_core.node_name import CERTIFIED_ROLES, NODE_ROLES, OPERATOR
from spolia_node.health import HEALTH_SERVICE

DECODE = decode_pb2.DESCRIPTOR.services_by_name["DecodeService"].full_name
DIRECTORY = directory_pb2.DESCRIPTOR.services_by_name["DirectoryService"].full_name
GATEWAY = gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"].full_name
KVSTORE = kvstore_pb2.DESCRIPTOR.services_by_name["KVStoreService"].full_name
PEER = "spolia.v1.PeerService"
PREFILL = prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"].full_name

EDGES: Mapping[str, frozenset[str]] = {
    DECODE: frozenset({"gateway"}),
    PREFILL: frozenset({"gateway", "decode"}),
    PEER: frozenset({"decode"}),
    KVSTORE: frozenset({"gateway", "prefill", "decode", OPERATOR}),
    f"{KVSTORE}/Put": frozenset({"prefill", "decode"}),
    f"{KVSTORE}/Delete": frozenset({"gateway", OPERATOR}),
    f"{KVSTORE}/List": frozenset({OPERATOR}),
    f"{KVSTORE}/Verify": frozenset({OPERATOR}),
    f"{KVSTORE}/Collect": frozenset({OPERATOR}),
    f"{DIRECTORY}/Register": frozenset(NODE_ROLES),
    f"{DIRECTORY}/Watch": frozenset(CERTIFIED_ROLES),
    HEALTH_SERVICE: frozenset(CERTIFIED_ROLES),
    reflection.SERVICE_NAME: frozenset(CERTIFIED_ROLES),
}
"""Roles by the service they may call; a method of its own name goes before its service."""

FRONT_DOORS = frozenset({GATEWAY})
"""Services for callers without a certificate, who show a key instead. A server that has one asks nobody for a
certificate."""


def callers_of(method: str) -> frozenset[str]:
    """The roles that may call a method, "/package.Service/Method"."""
    full_name = method.strip("/")
    return EDGES.get(full_name) or EDGES.get(full_name.rpartition("/")[0]) or frozenset()
