"""Who is let in at the front door, as whom, and how much of everything each may have."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from captured_logs import captured_logs
from gateway_fakes import WAIT_S, FakeDecode, fails_after, hangs
from gateway_worlds import text_request, world
from google.protobuf.descriptor import Descriptor
from key_worlds import Keys, generate, guarded, refusal, shown, tokenize

from spolia import AsyncClient
from spolia.local_authority import init_authority
from spolia.v1 import gateway_pb2
from spolia_core.errors import Forbidden, InvalidRequest, SpoliaError, Unauthenticated
from spolia_core.key_book import KeyBook, Role, new_key
from spolia_gateway.config import GatewayConfig
from spolia_gateway.identities import NEEDS, Identities
from spolia_node.metrics import Metrics


async def test_a_key_is_its_tenant_and_nothing_sent_beside_it_names_another(model: Path, keys: Keys) -> None:
    decode = FakeDecode("a")
    async with guarded(model, keys, decode) as w:
        await generate(w, keys.of["acme"])
        forged = text_request("the stones")
        # A field of that name and number, as the inner contract has it: the front door's has none.
        forged.MergeFromString(b"\xea\x07\x04bolt")
        metadata = (*shown(keys.of["acme"]), ("tenant-id", "bolt"), ("x-tenant", "bolt"))
        async for _ in w.stub.Generate(forged, timeout=WAIT_S, metadata=metadata):
            pass
        await generate(w, keys.of["bolt"])
    assert [request.tenant_id for request in decode.requests] == ["acme", "acme", "bolt"]


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (None, "no_key"),
        (shown("sk-spolia-guess"), "unknown_key"),
        (shown("x" * 4000), "unknown_key"),
        ((("authorization", "Basic YTpi"),), "not_bearer"),
        ((("authorization", "Bearer "),), "not_bearer"),
        ((("authorization", ""),), "not_bearer"),
    ],
)
async def test_who_shows_no_good_key_is_refused_logged_and_counted(
    metadata: Any, reason: str, model: Path, keys: Keys
) -> None:
    decode = FakeDecode("a")
    with captured_logs() as logs:
        async with guarded(model, keys, decode) as w:
            error, code = await refusal(tokenize(w, metadata))
            assert code is grpc.StatusCode.UNAUTHENTICATED
            assert isinstance(error, Unauthenticated)
            assert w.node.server.metrics.value("spolia_gateway_refused_total", reason=reason) == 1
    assert not decode.requests
    assert [entry["reason"] for entry in logs if entry["event"] == "caller refused"] == [reason]


async def test_every_call_of_the_service_asks_for_a_key(model: Path, keys: Keys) -> None:
    methods = gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"].methods
    assert {method.name for method in methods} == set(NEEDS)
    async with guarded(model, keys, FakeDecode("a")) as w:
        for method in methods:
            request = getattr(gateway_pb2, method.input_type.name)()
            call = getattr(w.stub, method.name)(request, timeout=WAIT_S)
            _, code = await refusal(call.read() if hasattr(call, "read") else call)
            assert code is grpc.StatusCode.UNAUTHENTICATED, method.name
        assert w.node.gateway.num_running == 0


async def test_only_operators_see_the_cluster(model: Path, keys: Keys) -> None:
    async with guarded(model, keys, FakeDecode("a")) as w:
        request = gateway_pb2.GetClusterRequest()
        error, code = await refusal(w.stub.GetCluster(request, timeout=WAIT_S, metadata=shown(keys.of["acme"])))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert isinstance(error, Forbidden)
        assert w.node.server.metrics.value("spolia_gateway_refused_total", reason="role") == 1
        found = await w.stub.GetCluster(request, timeout=WAIT_S, metadata=shown(keys.of["ops"]))
        assert found.nodes
        assert await tokenize(w, shown(keys.of["ops"]))


async def test_an_operator_sees_whose_each_request_under_way_is(model: Path, keys: Keys) -> None:
    async with guarded(model, keys, FakeDecode("a", hangs)) as w:
        call = w.stub.Generate(text_request("the stones"), timeout=WAIT_S, metadata=shown(keys.of["acme"]))
        await call.read()
        asked = gateway_pb2.GetClusterRequest()
        found = await w.stub.GetCluster(asked, timeout=WAIT_S, metadata=shown(keys.of["ops"]))
        assert [request.tenant_id for request in found.requests] == ["acme"]
        call.cancel()
        await w.idle()


async def test_users_are_shown_another_certificate_than_nodes_where_there_is_one(
    model: Path, keys: Keys, tmp_path: Path
) -> None:
    init_authority(tmp_path / "public", timedelta(days=1))
    for ending in ("crt", "key"):
        (tmp_path / "public" / f"gateway.{ending}").rename(tmp_path / "public" / f"tls.{ending}")
    async with guarded(model, keys, FakeDecode("a"), public_tls_dir=tmp_path / "public") as w:
        client = AsyncClient(
            w.node.server.address,
            api_key=keys.of["acme"],
            ca_file=tmp_path / "public" / "ca.crt",
            timeout_s=WAIT_S,
        )
        async with client:
            assert await client.tokenize("stones")


def test_no_request_of_a_user_can_name_a_tenant_or_a_chunk() -> None:
    def fields(message: Descriptor, seen: set[str]) -> set[str]:
        if message.full_name in seen:
            return set()
        seen.add(message.full_name)
        nested = [fields(field.message_type, seen) for field in message.fields if field.message_type]
        return {field.name for field in message.fields}.union(*nested)

    for method in gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"].methods:
        names = fields(method.input_type, set())
        assert not [name for name in names if "tenant" in name or "chunk_id" in name or "fingerprint" in name], method


@pytest.mark.parametrize("inner", [Forbidden("for gateway, not for decode"), Unauthenticated("for nodes")])
async def test_a_node_that_refuses_the_gateway_is_away_and_no_fault_of_the_users_key(
    inner: SpoliaError, model: Path, keys: Keys
) -> None:
    refusing, serving = FakeDecode("a", fails_after(0, inner)), FakeDecode("b")
    async with guarded(model, keys, refusing, serving) as w:
        assert await generate(w, keys.of["acme"]) > 1
        assert (len(refusing.requests), len(serving.requests)) == (1, 1)
    async with guarded(model, keys, FakeDecode("a", fails_after(0, inner))) as w:
        _, code = await refusal(generate(w, keys.of["acme"]))
        assert code is grpc.StatusCode.UNAVAILABLE


async def test_on_loopback_without_keys_everybody_is_the_operator_of_the_set_tenant(model: Path) -> None:
    decode = FakeDecode("a")
    async with world(model, decodes=[decode], tenant="mine") as w:
        for key in (None, "sk-anything"):
            assert await generate(w, key) > 1
        assert (await w.stub.GetCluster(gateway_pb2.GetClusterRequest(), timeout=WAIT_S)).nodes
    assert {request.tenant_id for request in decode.requests} == {"mine"}


async def test_anonymous_callers_beside_keys_are_users_and_said_aloud(model: Path, keys: Keys) -> None:
    keys.limit("default", max_requests=1)
    with captured_logs() as logs:
        async with guarded(model, keys, FakeDecode("a"), allow_anonymous=True) as w:
            assert await tokenize(w, None)
            _, code = await refusal(w.stub.GetCluster(gateway_pb2.GetClusterRequest(), timeout=WAIT_S))
            assert code is grpc.StatusCode.PERMISSION_DENIED
            _, code = await refusal(tokenize(w, shown("sk-spolia-guess")))
            assert code is grpc.StatusCode.UNAUTHENTICATED  # a wrong key is not no key
            assert w.node.identities.of(None).limits.max_requests == 1
    assert any("WITHOUT a key" in entry["event"] for entry in logs)


def test_outside_loopback_a_gateway_has_keys_or_says_so(tmp_path: Path) -> None:
    outside: dict[str, Any] = {
        "host": "0.0.0.0",
        "advertise_host": "gateway",
        "cluster_secret": "s3cret",
        "allow_plaintext": True,
    }
    with pytest.raises(InvalidRequest, match="keys must be set when host is not loopback"):
        GatewayConfig(**outside)
    assert GatewayConfig(**outside, keys="keys.json").anonymous is None
    anonymous = GatewayConfig(**outside, allow_anonymous=True).anonymous
    assert anonymous is not None
    assert anonymous.roles == {Role.USER}
    with pytest.raises(InvalidRequest, match="only operators write there"):
        GatewayConfig(**outside, allow_anonymous=True, tenant="shared")


def test_a_key_among_many_is_found_however_its_header_is_spaced() -> None:
    book = KeyBook()
    for _ in range(100):
        key, record = new_key("acme")
        book = book.with_key(record)
    found = Identities(lambda: book, None, Metrics())
    assert found.of(key).tenant_id == "acme"
    assert found.of_header(f"bearer  {key} ").key_id == record.key_id
