"""Who reaches a store's objects and its directory when nodes have certificates."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from captured_logs import captured_logs
from kvstore_worlds import TENANT, eventually, fresh_id, make_chunk, running_node

from spolia.local_authority import init_authority
from spolia.store_admin import StoreAdmin
from spolia.v1 import directory_pb2, kvstore_pb2
from spolia.v1.common_pb2 import MISS_REASON_NOT_FOUND
from spolia.v1.directory_pb2_grpc import DirectoryServiceStub
from spolia.v1.kvstore_pb2_grpc import KVStoreServiceStub
from spolia_core.errors import Busy, Unavailable
from spolia_core.ids import IdSpace, Recipe, tenant_key
from spolia_core.key_book import TenantLimits
from spolia_core.key_file import KeyFile
from spolia_kvstore.node import KVStoreNode
from spolia_node import handshakes, key_watch
from spolia_node.certificates import NodeCertificates
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline
from spolia_node.store_address import stores_at
from spolia_node.store_client import StoreClient

WAIT_S = 30
CHUNK = make_chunk(1)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    init_authority(folder, timedelta(days=1))
    return folder


@asynccontextmanager
async def calling_as(certificates: Path, role: str, node: KVStoreNode) -> AsyncIterator[ChannelPool]:
    pool = ChannelPool(16 << 20, NodeCertificates(certificates, role))
    try:
        yield pool
    finally:
        await pool.close()


def heartbeat(node_id: str, role: directory_pb2.NodeRole.ValueType) -> directory_pb2.RegisterRequest:
    return directory_pb2.RegisterRequest(
        record=directory_pb2.NodeRecord(node_id=node_id, role=role, address="127.0.0.1:9")
    )


async def registered(pool: ChannelPool, node: KVStoreNode, request: directory_pb2.RegisterRequest) -> Any:
    calls: Any = DirectoryServiceStub(pool.get(node.server.address, "kvstore"))
    call = calls.Register(iter([request]), timeout=WAIT_S)
    try:
        return await call.read()
    finally:
        call.cancel()


@pytest.mark.parametrize(
    ("node_id", "role"),
    [
        ("mine", directory_pb2.NODE_ROLE_GATEWAY),
        ("mine", directory_pb2.NODE_ROLE_KVSTORE),
        ("the-store", directory_pb2.NODE_ROLE_PREFILL),  # in the place of a node of another role
    ],
)
async def test_a_node_registers_as_what_its_certificate_says_and_takes_no_others_place(
    node_id: str, role: directory_pb2.NodeRole.ValueType, certificates: Path
) -> None:
    with captured_logs() as logs:
        async with (
            running_node(tls_dir=certificates, node_id="the-store") as node,
            calling_as(certificates, "prefill", node) as pool,
        ):
            assert node.server.registration is not None
            registration: Any = node.server.registration
            await registration.wait_registered(Deadline.after(WAIT_S))  # by its own certificate, at its own directory
            assert (await registered(pool, node, heartbeat("good", directory_pb2.NODE_ROLE_PREFILL))).lease_ms
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await registered(pool, node, heartbeat(node_id, role))
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert node.directory.role_of("the-store") == directory_pb2.NODE_ROLE_KVSTORE
            labels = {"service": "spolia.v1.DirectoryService", "method": "Register", "code": "PERMISSION_DENIED"}
            assert node.server.metrics.value("spolia_rpc_requests_total", **labels) == 1
    assert [entry["role"] for entry in logs if entry["event"] == "registration refused"] == ["prefill"]


async def test_a_tenant_that_forges_its_name_at_a_store_reaches_nothing_and_is_counted_and_logged(
    certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshakes, "GRACE_S", 0.5)
    with captured_logs() as logs:
        async with running_node(tls_dir=certificates) as node, calling_as(certificates, "decode", node) as pool:
            store = StoreClient(pool, lambda: stores_at(node.server.address))
            await store.put(TENANT, CHUNK.info, memoryview(CHUNK.data), Deadline.after(WAIT_S))
            await forge_a_lookup(certificates, node.server.address)
            metrics = node.server.metrics
            labels = {"service": "spolia.v1.KVStoreService", "method": "Lookup", "code": "OK"}
            assert metrics.value("spolia_rpc_requests_total", **labels) == 0
            await eventually(lambda: metrics.value("spolia_tls_handshakes_total", outcome="unused") >= 2)
    assert any(entry["event"].startswith("nobody called after a TLS handshake") for entry in logs)


async def forge_a_lookup(certificates: Path, address: str) -> None:
    """With what a tenant has: the address, the authority's certificate, and the right to be heard by a gateway."""
    request = kvstore_pb2.LookupRequest(tenant_id=TENANT, chunk_ids=[CHUNK.chunk_id])
    credentials = grpc.ssl_channel_credentials((certificates / "ca.crt").read_bytes())
    options = [("grpc.ssl_target_name_override", "kvstore.node.spolia.internal")]
    for channel in (
        grpc.aio.secure_channel(address, credentials, options=options),
        grpc.aio.insecure_channel(address),
    ):
        async with channel:
            call: Any = KVStoreServiceStub(channel)
            metadata = (("authorization", "Bearer sk-spolia-known-at-the-gateway"), ("tenant-id", TENANT))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.Lookup(request, timeout=WAIT_S, metadata=metadata)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_ids_that_are_guessed_name_nothing_of_another_tenants(certificates: Path) -> None:
    """Not even with a node's certificate: an id under another tenant is another object."""
    async with running_node(tls_dir=certificates) as node, calling_as(certificates, "decode", node) as pool:
        store = StoreClient(pool, lambda: stores_at(node.server.address))
        await store.put(TENANT, CHUNK.info, memoryview(CHUNK.data), Deadline.after(WAIT_S))
        call: Any = KVStoreServiceStub(pool.get(node.server.address, "kvstore"))
        ids = [CHUNK.chunk_id, fresh_id()]
        (own, fresh) = (await call.Lookup(kvstore_pb2.LookupRequest(tenant_id=TENANT, chunk_ids=ids))).entries
        assert own.HasField("info")
        others = (await call.Lookup(kvstore_pb2.LookupRequest(tenant_id="guesser", chunk_ids=ids))).entries
        assert [entry.HasField("info") for entry in others] == [False, False]
        assert {entry.miss for entry in others} == {MISS_REASON_NOT_FOUND}
        assert others[0] == others[1] == fresh  # nor is it told that it exists
        read = [each async for each in call.Get(kvstore_pb2.GetRequest(tenant_id="guesser", chunk_ids=ids))]
        assert [each.header.entry.miss for each in read] == [MISS_REASON_NOT_FOUND] * 2
        misses = node.server.metrics.value("spolia_store_misses_total", reason="not_found")
        assert misses == 2, "counted as what they are for the guesser: chunks that are not there"


def test_no_tenant_can_derive_anothers_ids_from_the_same_text() -> None:
    recipe, fingerprint, tokens = Recipe("float32"), b"f" * 32, range(64)
    spaces = [
        IdSpace(tenant_key(secret, name), fingerprint, recipe)
        for secret, name in ((b"s", "a"), (b"s", "b"), (b"", "a"))
    ]
    assert len({space.local(tokens) for space in spaces}) == 3


async def test_an_operators_tools_list_objects_and_cannot_put(certificates: Path) -> None:
    async with running_node(tls_dir=certificates) as node, calling_as(certificates, "decode", node) as decode:
        store = StoreClient(decode, lambda: stores_at(node.server.address))
        await store.put(TENANT, CHUNK.info, memoryview(CHUNK.data), Deadline.after(WAIT_S))

        def listed() -> list[bytes]:
            with StoreAdmin([node.server.address], tls_dir=certificates, timeout_s=WAIT_S) as admin:
                return [found.chunk_id for found in admin.list_objects().objects]

        assert await asyncio.to_thread(listed) == [CHUNK.chunk_id]
        async with calling_as(certificates, "operator", node) as operator:
            call: Any = KVStoreServiceStub(operator.get(node.server.address, "kvstore"))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.Put(iter([kvstore_pb2.PutRequest()]), timeout=WAIT_S)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        labels = {"service": "spolia.v1.KVStoreService", "reason": "wrong_role"}
        assert node.server.metrics.value("spolia_refused_calls_total", **labels) == 1


async def test_a_stores_quotas_follow_the_keys_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_watch, "LOOK_EVERY_S", 0.02)
    place = KeyFile(tmp_path / "keys.json")

    def limit(num_bytes: int) -> None:
        place.change(lambda book: book.with_limits(TENANT, TenantLimits(max_cache_bytes=num_bytes)))

    limit(2 * len(CHUNK.data))
    async with running_node(keys=place.name) as node:
        pool = ChannelPool(16 << 20)
        store = StoreClient(pool, lambda: stores_at(node.server.address))
        try:
            await store.put(TENANT, CHUNK.info, memoryview(CHUNK.data), Deadline.after(WAIT_S))
            limit(len(CHUNK.data) // 2)
            await eventually(lambda: node.store.tenants.quota(TENANT).num_bytes == len(CHUNK.data) // 2)
            other = make_chunk(2)
            with pytest.raises(Busy, match="quota"):
                await store.put(TENANT, other.info, memoryview(other.data), Deadline.after(WAIT_S))
            await store.put("another", other.info, memoryview(other.data), Deadline.after(WAIT_S))
        finally:
            await pool.close()


async def test_a_node_without_certificates_finds_no_store_that_has_them(certificates: Path) -> None:
    async with running_node(tls_dir=certificates) as node:
        pool = ChannelPool(16 << 20)
        try:
            store = StoreClient(pool, lambda: stores_at(node.server.address))
            with pytest.raises(Unavailable):
                await store.put(TENANT, CHUNK.info, memoryview(CHUNK.data), Deadline.after(WAIT_S))
        finally:
            await pool.close()
