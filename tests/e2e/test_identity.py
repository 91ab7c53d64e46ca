"""A cluster of real processes under TLS and keys: who gets in, what a rotation cuts, and that its tenants are apart."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from e2e_world import DEMO_MODEL, ledgers_are_empty, wait_until

from spolia import Client, Document
from spolia.cli import doctor
from spolia.cli.app import run
from spolia.doctor import isolation
from spolia.errors import Forbidden, InvalidRequest, Unauthenticated
from spolia.local_authority import init_authority, renew_certificates
from spolia.local_cluster import LocalCluster
from spolia.results import Result
from spolia.store_admin import StoreAdmin
from spolia.v1 import decode_pb2
from spolia.v1.decode_pb2_grpc import DecodeServiceStub
from spolia_core.key_book import Role, new_key
from spolia_core.key_file import KeyFile

pytestmark = pytest.mark.slow

TENANTS = ("acme", "bolt")
DAY = timedelta(days=1)
MANUAL = Document("The stones of one building are cut and set again in another. " * 6, name="manual")


@dataclass
class Guarded:
    """The cluster, its files, and keys by tenant."""

    cluster: LocalCluster
    certificates: Path
    keys: KeyFile
    key_of: dict[str, str] = field(default_factory=dict)

    def client(self, tenant: str) -> Client:
        return Client(
            self.cluster.address,
            api_key=self.key_of[tenant],
            ca_file=self.certificates / "ca.crt",
            timeout_s=60.0,
        )

    def shown(self) -> str:
        """The certificate that the gateway shows now."""
        host, port = self.cluster.address.split(":")
        return ssl.get_server_certificate((host, int(port)), ca_certs=str(self.certificates / "ca.crt"))

    def address_of(self, role: str) -> str:
        return next(node.address for node in self.cluster.nodes if node.role == role)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    init_authority(folder / "certs", DAY)
    keys, key_of = KeyFile(folder / "keys.json"), {}
    for tenant in (*TENANTS, "ops"):
        key_of[tenant], record = new_key(tenant, frozenset({Role.OPERATOR if tenant == "ops" else Role.USER}))
        keys.change(lambda book, record=record: book.with_key(record))  # type: ignore[misc]  # bound now
    cluster = LocalCluster(
        DEMO_MODEL, log_dir=folder / "logs", tls_dir=folder / "certs", keys=keys.name, api_key=key_of["ops"]
    )
    with cluster:
        yield Guarded(cluster, folder / "certs", keys, key_of)


def ask(client: Client) -> Result:
    return client.generate([MANUAL, "Why?"], mode="linked", max_tokens=4)


def test_one_tenants_document_is_another_tenants_miss(guarded: Guarded) -> None:
    with guarded.client("acme") as acme, guarded.client("bolt") as bolt:
        acme.warm([MANUAL])
        assert ask(acme).reuse.num_reused_tokens > 0
        strangers = ask(bolt)
        assert strangers.reuse.num_reused_tokens == 0
        assert strangers.reuse.misses
        assert bolt.forget([MANUAL]).num_stored_dropped <= 1  # its own copy, made a moment ago, and not the other's
        assert ask(acme).reuse.num_reused_tokens > 0
        with pytest.raises(Forbidden):
            bolt.cluster()


def test_a_tenant_reaches_no_node_but_the_gateway(guarded: Guarded) -> None:
    """With all that a tenant has: the addresses, the authority's certificate, a good key, and another's name."""
    authority = grpc.ssl_channel_credentials((guarded.certificates / "ca.crt").read_bytes())
    options = [("grpc.ssl_target_name_override", "decode.node.spolia.internal")]
    address = guarded.address_of("decode")
    forged = decode_pb2.DecodeServiceGenerateRequest(request_id="forged", tenant_id="acme")
    metadata = (("authorization", f"Bearer {guarded.key_of['bolt']}"),)
    for channel in (grpc.insecure_channel(address), grpc.secure_channel(address, authority, options=options)):
        with channel, pytest.raises(grpc.RpcError) as caught:
            list(DecodeServiceStub(channel).Generate(forged, timeout=10, metadata=metadata))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    plain = Client(guarded.cluster.address, api_key=guarded.key_of["acme"], timeout_s=5.0, retry_s=0)
    with plain, pytest.raises(InvalidRequest, match="speaks TLS, and was called in plaintext"):
        plain.models()
    with guarded.client("acme") as acme:
        acme.models()


def test_certificates_are_replaced_under_a_stream(guarded: Guarded) -> None:
    with guarded.client("acme") as acme, guarded.client("ops") as operator:
        with acme.stream("Once upon a time", max_tokens=200, ignore_eos=True) as stream:
            deltas = iter(stream)
            next(deltas)
            before = guarded.shown()
            renew_certificates(guarded.certificates, DAY)
            time.sleep(1.2)  # nodes look once a second
            with guarded.client("acme") as newcomer:
                assert ask(newcomer).num_generated_tokens
            num_tokens = 1 + sum(len(delta.token_ids) for delta in deltas)
        assert num_tokens >= 200
        assert guarded.shown() != before
        wait_until("every ledger is empty", lambda: ledgers_are_empty(operator))


def test_the_doctor_finds_all_well_and_leaves_no_key(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPOLIA_TLS_DIR", str(guarded.certificates))
    before = guarded.keys.read()
    address = guarded.cluster.address
    arguments = ["doctor", "--address", address, "--keys", guarded.keys.name, "--rounds", "8", "--seed", "1", "--json"]
    monkeypatch.setattr(isolation, "DOCUMENT_TOKENS", 256)
    with pytest.raises(SystemExit) as ended:
        run(arguments)
    findings = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    for check in ("gateway", "nodes", "versions", "clock", "keys", "node doors"):
        assert findings[check]["state"] == "ok", findings[check]
    assert findings["tls"]["state"] == "warning"  # a day is left
    for mode in ("exact", "linked"):
        apart = findings[f"isolation ({mode})"]
        assert apart["facts"]["num_leaked_tokens"] == 0
        assert apart["facts"]["num_hit_tokens"] > 0
        assert apart["state"] in ("ok", "warning"), apart  # a warning where the machine is too busy to tell
    assert not ended.value.code
    assert guarded.keys.read() == before
    assert findings["clean-up"]["state"] == "ok", findings["clean-up"]
    assert findings["clean-up"]["facts"]["num_objects"] > 0
    stores = [node.address for node in guarded.cluster.nodes if node.role == "kvstore"]
    with StoreAdmin(stores) as admin:
        for tenant in doctor.TENANTS:
            assert not admin.list_objects(tenant_id=tenant).objects


def test_a_key_that_is_withdrawn_is_refused_within_seconds(guarded: Guarded) -> None:
    with guarded.client("bolt") as bolt:
        bolt.models()
        guarded.keys.change(lambda book: book.only(lambda record: record.tenant_id != "bolt"))

        def refused() -> bool:
            try:
                bolt.models()
            except Unauthenticated:
                return True
            return False

        wait_until("the key is refused", refused, timeout_s=10.0)
