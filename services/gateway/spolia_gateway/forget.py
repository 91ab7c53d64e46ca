"""Drops documents from every store and from the memory of decode and prefill nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import grpc

from spolia.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    directory_pb2,
    gateway_pb2,
    kvstore_pb2,
    prefill_pb2,
    prefill_pb2_grpc,
)
from spolia_core.errors import SpoliaError, Unavailable
from spolia_gateway.config import MAX_IDS_PER_CALL
from spolia_gateway.failures import failure_of, said_inside
from spolia_gateway.store_failures import store_failures_in_words
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline
from spolia_node.logs import get_log
from spolia_node.membership import ClusterView
from spolia_node.store_answers import sum_deleted
from spolia_node.store_client import StoreClient

STORE = "store"
STORE_SHARE = 0.5
"""Share of the caller's time that a store which does not answer may use up; the rest is for the nodes."""

log = get_log(__name__)


class Forgetter:
    """Drops chunks everywhere they can be."""

    def __init__(self, cluster: ClusterView, channels: ChannelPool, store: StoreClient) -> None:
        self._cluster = cluster
        self._channels = channels
        self._store = store

    async def run(
        self, tenant_id: str, chunk_ids: Sequence[bytes], deadline: Deadline, *, stored_too: Sequence[bytes] = ()
    ) -> gateway_pb2.ForgetResponse:
        """Drops the chunks and counts what went; of those in `stored_too`, only what stores have under this tenant.

        Stores go first, every replica, so that no node fetches again what it has just dropped; then every decode and
        prefill node, draining ones too. Raises `Unavailable`, naming those that could not be asked, after asking all
        the others: forgetting is idempotent, so the caller tries again until it succeeds.
        """
        stored = await self._drop_stored(tenant_id, [*chunk_ids, *stored_too], deadline.share(STORE_SHARE))
        nodes = [
            node
            for role in (directory_pb2.NODE_ROLE_DECODE, directory_pb2.NODE_ROLE_PREFILL)
            for node in self._cluster.nodes(role, include_draining=True)
        ]
        dropped = await asyncio.gather(*(self._drop_resident(node, tenant_id, chunk_ids, deadline) for node in nodes))
        _raise_if_any_failed([(STORE, stored), *zip((node.node_id for node in nodes), dropped, strict=True)])
        counts = stored if isinstance(stored, kvstore_pb2.DeleteResponse) else kvstore_pb2.DeleteResponse()
        return gateway_pb2.ForgetResponse(
            num_stored_dropped=counts.num_deleted,
            stored_bytes_dropped=counts.bytes_deleted,
            num_resident_dropped=sum(count for count in dropped if isinstance(count, int)),
            stored_tiers=counts.tiers,
        )

    async def _drop_stored(
        self, tenant_id: str, chunk_ids: Sequence[bytes], deadline: Deadline
    ) -> kvstore_pb2.DeleteResponse | SpoliaError:
        """What went, or why it failed: nodes are asked even when a store is away."""
        deleted: list[kvstore_pb2.DeleteResponse] = []
        try:
            for start in range(0, len(chunk_ids), MAX_IDS_PER_CALL):
                ids = chunk_ids[start : start + MAX_IDS_PER_CALL]
                with store_failures_in_words():
                    deleted.append(await self._store.delete(tenant_id, ids, deadline))
        except SpoliaError as error:
            return error
        return sum_deleted(deleted)

    async def _drop_resident(
        self, node: directory_pb2.NodeRecord, tenant_id: str, chunk_ids: Sequence[bytes], deadline: Deadline
    ) -> int | SpoliaError:
        """Runs dropped, or why it failed: one node's failure must not keep the others from being asked."""
        is_prefill = node.role == directory_pb2.NODE_ROLE_PREFILL
        channel = self._channels.get(node.address, "prefill" if is_prefill else "decode")
        timeout = deadline.remaining()
        try:
            if is_prefill:
                asked = prefill_pb2.PrefillServiceDropRequest(tenant_id=tenant_id, chunk_ids=chunk_ids)
                return (await prefill_pb2_grpc.PrefillServiceStub(channel).Drop(asked, timeout=timeout)).num_dropped
            request = decode_pb2.DropRequest(tenant_id=tenant_id, chunk_ids=chunk_ids)
            return (await decode_pb2_grpc.DecodeServiceStub(channel).Drop(request, timeout=timeout)).num_dropped
        except grpc.RpcError as error:
            failure = failure_of(error, node, "what is to be forgotten")
            log.warning("node did not forget", node=node.node_id, error=repr(failure), said=said_inside(failure))
            return failure


def _raise_if_any_failed(results: Iterable[tuple[str, object]]) -> None:
    failed = {name: result for name, result in results if isinstance(result, SpoliaError)}
    if failed:
        reasons = "; ".join(f"{name}: {error.message}" for name, error in failed.items())
        raise Unavailable(
            f"not forgotten everywhere, try again: {reasons}",
            field="nodes",
            actual=", ".join(failed),
            retry_after_ms=1000,
        )
