"""Who gets through a node's door, and what happens to those who do not."""

from __future__ import annotations

import asyncio
import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from captured_logs import captured_logs
from tls_worlds import DAY, authority_in, channel_to, credentials_of, credentials_unchecked, expired, serving_tls

from spolia.local_authority import LocalAuthority, renew_certificates
from spolia.v1 import directory_pb2, kvstore_pb2
from spolia.v1.directory_pb2_grpc import DirectoryServiceStub
from spolia.v1.kvstore_pb2_grpc import KVStoreServiceStub
from spolia_core.errors import InvalidRequest
from spolia_core.node_name import CERTIFIED_ROLES, NODE_ROLES, role_in
from spolia_node import edges, handshakes
from spolia_node.certificates import LOOK_EVERY_S, NodeCertificates
from spolia_node.channels import ChannelPool
from spolia_node.config import NodeConfig
from spolia_node.edges import EDGES, callers_of
from spolia_node.server import NodeServer

WAIT_S = 30


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return authority_in(tmp_path_factory.mktemp("certificates"))


async def stats(channel: grpc.aio.Channel) -> int:
    call: Any = KVStoreServiceStub(channel)
    return (await call.GetStats(kvstore_pb2.GetStatsRequest(), timeout=WAIT_S)).num_objects


async def refused(channel: grpc.aio.Channel) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stats(channel)
    return caught.value.code()


async def until(condition: Any) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110  # a counter has no event
            await asyncio.sleep(0.02)


async def test_a_node_with_business_there_is_served(certificates: Path) -> None:
    async with (
        serving_tls(certificates) as server,
        channel_to(server.address, credentials_of(certificates, "decode")) as channel,
    ):
        assert await stats(channel) == 1
        assert server.metrics.value("spolia_tls_handshakes_total", outcome="used") == 1
        left_s = server.metrics.value("spolia_tls_certificate_expiry_timestamp_seconds", shown_to="nodes") - time.time()
        assert 0 < left_s <= DAY.total_seconds()


@pytest.mark.parametrize("who", ["nobody", "another authority", "expired", "plaintext"])
async def test_who_has_no_good_certificate_gets_no_connection_and_is_counted_and_logged(
    who: str, certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshakes, "GRACE_S", 0.1)
    authority = (certificates / "ca.crt").read_bytes()
    if who == "another authority":
        credentials = credentials_unchecked(authority_in(tmp_path), "decode", authority=certificates)
    elif who == "expired":
        LocalAuthority.open(certificates).issue(tmp_path, "decode", timedelta(seconds=-1))
        credentials = credentials_unchecked(tmp_path, "decode", authority=certificates)
    else:
        credentials = grpc.ssl_channel_credentials(authority)
    with captured_logs() as logs:
        async with serving_tls(certificates) as server:
            plain = who == "plaintext"
            channel = grpc.aio.insecure_channel(server.address) if plain else channel_to(server.address, credentials)
            async with channel:
                assert await refused(channel) is grpc.StatusCode.UNAVAILABLE
            await until(lambda: server.metrics.value("spolia_tls_handshakes_total", outcome="unused") >= 1)
            assert server.metrics.value("spolia_tls_handshakes_total", outcome="used") == 0
            assert server.num_running == 0
    assert any(entry["event"].startswith("nobody called after a TLS handshake") for entry in logs)


async def test_another_nodes_role_is_refused_by_name_counted_and_logged(certificates: Path) -> None:
    with captured_logs() as logs:
        async with (
            serving_tls(certificates) as server,
            channel_to(server.address, credentials_of(certificates, "kvstore")) as channel,
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stats(channel)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert "not for kvstore" in (caught.value.details() or "")
            labels = {"service": edges.KVSTORE, "reason": "wrong_role"}
            assert server.metrics.value("spolia_refused_calls_total", **labels) == 1
    assert [entry["reason"] for entry in logs if entry["event"] == "call refused"] == ["wrong_role"]


async def test_a_certificate_without_a_role_is_no_identity(certificates: Path, tmp_path: Path) -> None:
    LocalAuthority.open(certificates).issue(tmp_path, "janitor", DAY)
    credentials = credentials_unchecked(tmp_path, "janitor", authority=certificates)
    with captured_logs() as logs:
        async with serving_tls(certificates) as server, channel_to(server.address, credentials) as channel:
            assert await refused(channel) is grpc.StatusCode.UNAUTHENTICATED
            labels = {"service": edges.KVSTORE, "reason": "no_identity"}
            assert server.metrics.value("spolia_refused_calls_total", **labels) == 1
    assert [entry["reason"] for entry in logs if entry["event"] == "call refused"] == ["no_identity"]


async def test_a_refused_stream_is_never_read(certificates: Path) -> None:
    async with (
        serving_tls(certificates) as server,
        channel_to(server.address, credentials_of(certificates, "operator")) as channel,
    ):
        calls: Any = DirectoryServiceStub(channel)
        call = calls.Register(iter([directory_pb2.RegisterRequest()]), timeout=WAIT_S)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_every_method_of_every_inner_service_has_callers_and_all_of_them_are_roles() -> None:
    for module in (edges.decode_pb2, edges.directory_pb2, edges.kvstore_pb2, edges.prefill_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                assert callers_of(f"/{service.full_name}/{method.name}"), method.full_name
    assert frozenset().union(*EDGES.values()) <= set(CERTIFIED_ROLES)
    assert not callers_of("/spolia.v1.DecodeService2/Generate")
    assert callers_of("/spolia.v1.KVStoreService/Put") == {"prefill", "decode"}


async def test_a_node_of_another_role_cannot_stand_in_at_an_address(certificates: Path) -> None:
    """Whoever holds a prefill node's key and a store's address answers no call that is meant for a store."""
    async with serving_tls(certificates, "prefill") as impostor:
        pool = ChannelPool(16 << 20, NodeCertificates(certificates, "decode"))
        try:
            assert await refused(pool.get(impostor.address, "kvstore")) is grpc.StatusCode.UNAVAILABLE
            assert await stats(pool.get(impostor.address, "prefill")) == 1
        finally:
            await pool.close()


def test_a_role_is_read_only_from_one_known_uri() -> None:
    assert role_in(["spolia://node/decode", "https://elsewhere"]) == "decode"
    for uris in (
        [],
        ["spolia://node/root"],
        ["spolia://node/decode", "spolia://node/prefill"],
        ["SPOLIA://node/decode"],
    ):
        assert role_in(uris) == ""


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda folder: (folder / "kvstore.key").write_bytes((folder / "decode.key").read_bytes()), "is not the key"),
        (lambda folder: (folder / "kvstore.crt").write_bytes(b"none"), "holds no PEM certificate"),
        (lambda folder: (folder / "ca.crt").unlink(), "cannot be read"),
        (lambda folder: expired(folder, "kvstore"), "expired at"),
        (
            lambda folder: [
                (folder / f"kvstore.{e}").write_bytes((folder / f"decode.{e}").read_bytes()) for e in ("crt", "key")
            ],
            "is for decode, not kvstore",
        ),
        (lambda folder: LocalAuthority.create(DAY).save(folder), "is signed by no certificate in ca.crt"),
    ],
)
def test_certificates_that_cannot_work_stop_the_start_by_name(break_it: Any, says: str, tmp_path: Path) -> None:
    folder = authority_in(tmp_path / "certs")
    break_it(folder)
    with pytest.raises(InvalidRequest, match=says) as caught:
        NodeServer(NodeConfig(tls_dir=folder), "kvstore")
    assert caught.value.field == "tls_dir"


def test_a_rotation_half_way_changes_nothing_and_a_whole_one_does(tmp_path: Path) -> None:
    folder, now = authority_in(tmp_path / "certs"), 0.0
    found = NodeCertificates(folder, "decode", lambda: now)
    before = found.current()
    renew_certificates(tmp_path / "certs", DAY, roles=["prefill"])
    (folder / "decode.key").write_bytes((folder / "prefill.key").read_bytes())
    now += LOOK_EVERY_S
    with captured_logs() as logs:
        assert found.current() == before
        now += LOOK_EVERY_S
        assert found.current() == before
    assert len(logs) == 1  # said once
    renew_certificates(folder, DAY, roles=["decode"])
    now += LOOK_EVERY_S
    assert found.current() != before


async def test_a_rotation_under_way_cuts_no_call_and_new_calls_use_the_new_authority(tmp_path: Path) -> None:
    """The authority itself is replaced: first both are believed, then nodes change over, then only the new one is."""
    folder, other = authority_in(tmp_path / "certs"), authority_in(tmp_path / "other")
    first = Path(shutil.copytree(folder, tmp_path / "first"))
    both = (folder / "ca.crt").read_bytes() + (other / "ca.crt").read_bytes()
    async with serving_tls(folder) as server:
        mine = NodeCertificates(folder, "decode")
        pool = ChannelPool(16 << 20, mine)
        try:
            store: Any = KVStoreServiceStub(pool.get(server.address, "kvstore"))
            gate: asyncio.Event = asyncio.Event()

            async def slowly() -> Any:
                yield kvstore_pb2.PutRequest()
                await gate.wait()
                yield kvstore_pb2.PutRequest()

            under_way = asyncio.ensure_future(store.Put(slowly(), timeout=WAIT_S))
            assert await stats(pool.get(server.address, "kvstore")) == 1
            old_channel = pool.get(server.address, "kvstore")
            (folder / "ca.crt").write_bytes(both)
            await asyncio.sleep(LOOK_EVERY_S)
            assert await stats(pool.get(server.address, "kvstore")) == 1
            for name in ("decode.key", "decode.crt", "kvstore.key", "kvstore.crt", "ca.crt"):
                (folder / name).write_bytes((other / name).read_bytes())
            await asyncio.sleep(LOOK_EVERY_S)
            assert await stats(pool.get(server.address, "kvstore")) == 1
            assert pool.get(server.address, "kvstore") is not old_channel
            gate.set()
            assert (await under_way).replica == "r"
            withdrawn = credentials_unchecked(first, "decode", authority=other)
            async with channel_to(server.address, withdrawn) as channel:
                assert await refused(channel) is grpc.StatusCode.UNAVAILABLE
        finally:
            await pool.close()


def test_outside_loopback_a_node_starts_with_certificates_or_says_so(tmp_path: Path) -> None:
    outside: dict[str, Any] = {"host": "0.0.0.0", "advertise_host": "node-1", "cluster_secret": "s3cret"}
    with pytest.raises(InvalidRequest, match="tls_dir must be set when host is not loopback") as caught:
        NodeConfig(**outside)
    assert caught.value.field == "tls_dir"
    assert NodeConfig(**outside, tls_dir=authority_in(tmp_path / "certs")).tls_dir
    assert NodeConfig(**outside, allow_plaintext=True).tls_dir is None


async def test_plaintext_outside_loopback_is_said_at_the_start() -> None:
    config = NodeConfig(host="0.0.0.0", advertise_host="127.0.0.1", cluster_secret="s3cret", allow_plaintext=True)
    server = NodeServer(config, "kvstore")
    with captured_logs() as logs:
        await server.start()
        await server.stop_at_once()
    assert [entry["log_level"] for entry in logs if "WITHOUT TLS" in entry["event"]] == ["warning"]


def test_there_is_a_certificate_for_every_node_and_for_operators(certificates: Path) -> None:
    for role in (*NODE_ROLES, "operator"):
        assert NodeCertificates(certificates, role).current().expires_at
        assert (certificates / f"{role}.key").stat().st_mode & 0o077 == 0
