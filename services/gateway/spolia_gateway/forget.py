"""Drops documents from the store and from the memory of decode nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import grpc

from spolia.v1 import decode_pb2, decode_pb2_grpc, directory_pb2, gateway_pb2
from spolia_core.errors import SpoliaError, Unavailable
from spolia_gateway.failures import failure_of
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline
from spolia_node.membership import ClusterView
from spolia_node.store_client import StoreClient

MAX_IDS_PER_CALL = 4096
"""What the store takes in one call."""


class Forgetter:
    """Drops chunks everywhere they can be."""

    def __init__(self, cluster: ClusterView, channels: ChannelPool, store: StoreClient) -> None:
        self._cluster = cluster
        self._channels = channels
        self._store = store

    async def run(self, tenant_id: str, chunk_ids: Sequence[bytes], deadline: Deadline) -> gateway_pb2.ForgetResponse:
        """Drops the chunks and counts what went.

        The store goes first, so that no decode node fetches again what it has just dropped; then every decode node,
        draining ones too. Raises `Unavailable`, naming those that could not be asked, after asking all the others:
        forgetting is idempotent, so the caller tries again until it succeeds.
        """
        num_stored, stored_bytes = 0, 0
        for start in range(0, len(chunk_ids), MAX_IDS_PER_CALL):
            deleted = await self._store.delete(tenant_id, chunk_ids[start : start + MAX_IDS_PER_CALL], deadline)
            num_stored, stored_bytes = num_stored + deleted.num_deleted, stored_bytes + deleted.bytes_deleted
        nodes = self._cluster.nodes(directory_pb2.NODE_ROLE_DECODE, include_draining=True)
        results = await asyncio.gather(*(self._drop(node, tenant_id, chunk_ids, deadline) for node in nodes))
        _raise_if_any_failed(zip(nodes, results, strict=True))
        return gateway_pb2.ForgetResponse(
            num_stored_dropped=num_stored,
            stored_bytes_dropped=stored_bytes,
            num_resident_dropped=sum(count for count in results if isinstance(count, int)),
        )

    async def _drop(
        self, node: directory_pb2.NodeRecord, tenant_id: str, chunk_ids: Sequence[bytes], deadline: Deadline
    ) -> int | SpoliaError:
        """Runs dropped, or why it failed: one node's failure must not keep the others from being asked."""
        stub = decode_pb2_grpc.DecodeServiceStub(self._channels.get(node.address))
        request = decode_pb2.DropRequest(tenant_id=tenant_id, chunk_ids=chunk_ids)
        try:
            return (await stub.Drop(request, timeout=deadline.remaining())).num_dropped
        except grpc.RpcError as error:
            return failure_of(error, node.node_id, node.address)


def _raise_if_any_failed(results: Iterable[tuple[directory_pb2.NodeRecord, int | SpoliaError]]) -> None:
    failed = {node.node_id: result for node, result in results if isinstance(result, SpoliaError)}
    if failed:
        reasons = "; ".join(f"{node_id}: {error.message}" for node_id, error in failed.items())
        raise Unavailable(
            f"not forgotten everywhere, try again: {reasons}",
            field="nodes",
            actual=", ".join(failed),
            retry_after_ms=1000,
        )
