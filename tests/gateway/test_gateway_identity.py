"""Who is let in at the front door, as whom, and how much of everything each may have."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from captured_logs import captured_logs
from gateway_fakes import WAIT_S, FakeDecode, answers, fails_after, hangs
from gateway_worlds import World, text_request, world
from google.protobuf.descriptor import Descriptor

from spolia import AsyncClient
from spolia.errors import error_from_rpc
from spolia.local_authority import init_authority
from spolia.v1 import gateway_pb2
from spolia_core.errors import Busy, Forbidden, InvalidRequest, SpoliaError, Unauthenticated
from spolia_core.key_book import KeyBook, Role, TenantLimits, new_key
from spolia_core.key_file import KeyFile
from spolia_gateway.config import GatewayConfig
from spolia_gateway.identities import NEEDS, Identities
from spolia_node import key_watch
from spolia_node.metrics import Metrics

OPERATOR = frozenset({Role.OPERATOR})


class Keys:
    """A file of keys, and the keys themselves by tenant."""

    def __init__(self, path: Path) -> None:
        self.place = KeyFile(path)
        self.of: dict[str, str] = {}

    def make(self, tenant_id: str, roles: frozenset[Role] = frozenset({Role.USER}), **changes: Any) -> str:
        key, record = new_key(tenant_id, roles, **changes)
        self.place.change(lambda book: book.with_key(record))
        self.of[tenant_id] = key
        return key

    def write(self, content: bytes) -> None:
        Path(self.place.name).write_bytes(content)

    def limit(self, tenant_id: str, **limits: int) -> None:
        self.place.change(lambda book: book.with_limits(tenant_id, TenantLimits(**limits)))


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keys:
    monkeypatch.setattr(key_watch, "LOOK_EVERY_S", 0.02)
    made = Keys(tmp_path / "keys.json")
    made.make("acme")
    made.make("bolt")
    made.make("ops", OPERATOR)
    return made


@asynccontextmanager
async def guarded(model: Path, keys: Keys, *decodes: FakeDecode, **changes: Any) -> AsyncIterator[World]:
    async with world(model, decodes=decodes, keys=keys.place.name, **changes) as w:
        yield w


def shown(key: str | None) -> Any:
    return None if key is None else (("authorization", f"Bearer {key}"),)


async def tokenize(w: World, metadata: Any, text: str = "stones") -> list[int]:
    request = gateway_pb2.TokenizeRequest(text=text)
    return list((await w.stub.Tokenize(request, timeout=WAIT_S, metadata=metadata)).token_ids)


async def generate(w: World, key: str | None, request: gateway_pb2.GenerateRequest | None = None) -> int:
    num_responses = 0
    async for _ in w.stub.Generate(request or text_request("the stones"), timeout=WAIT_S, metadata=shown(key)):
        num_responses += 1
    return num_responses


async def refusal(work: Any) -> tuple[SpoliaError, grpc.StatusCode]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await work
    return error_from_rpc(caught.value), caught.value.code()


async def until(condition: Any) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110  # a file has no event
            await asyncio.sleep(0.01)


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


async def test_a_key_ends_when_it_is_said_to(model: Path, keys: Keys) -> None:
    ended = keys.make("late", expires_at=datetime.now(UTC) - timedelta(seconds=1))
    fresh = keys.make("fresh", expires_at=datetime.now(UTC) + timedelta(hours=1))
    async with guarded(model, keys) as w:
        error, _ = await refusal(tokenize(w, shown(ended)))
        assert "ended at" in error.message
        assert w.node.server.metrics.value("spolia_gateway_refused_total", reason="expired_key") == 1
        assert await tokenize(w, shown(fresh))


async def test_a_withdrawn_key_ends_no_call_and_begins_none(model: Path, keys: Keys) -> None:
    key, go_on = keys.of["acme"], asyncio.Event()

    async def waits(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        await go_on.wait()
        async for event in answers(node, request, context):
            yield event

    decode = FakeDecode("a", waits)
    async with guarded(model, keys, decode) as w:
        under_way = asyncio.ensure_future(generate(w, key))
        await asyncio.wait_for(decode.started.wait(), WAIT_S)
        record = KeyBook.from_bytes(keys.place.read()).find(key)
        assert record is not None
        keys.place.change(lambda book: book.without_key(record.key_id))
        assert w.node._keys is not None
        watch = w.node._keys
        await until(lambda: watch.book.find(key) is None)
        _, code = await refusal(tokenize(w, shown(key)))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        go_on.set()
        assert await under_way > 1
        new = keys.make("acme")
        await until(lambda: watch.book.find(new) is not None)
        assert await tokenize(w, shown(new))


def reasons(logs: list[MutableMapping[str, Any]]) -> list[str]:
    return [entry["error"] for entry in logs if entry["event"].startswith("new keys cannot be used")]


async def test_a_file_that_goes_wrong_leaves_the_keys_as_they_are(model: Path, keys: Keys) -> None:
    async with guarded(model, keys) as w:
        good = keys.place.read()
        with captured_logs() as logs:
            for number, broken in enumerate((b"{", b'{"format": 9}', good[:100]), start=1):
                keys.write(broken)
                await until(lambda number=number: len(reasons(logs)) == number)
                assert await tokenize(w, shown(keys.of["acme"]))
        assert len(set(reasons(logs))) == 3  # once for each reason
        assert w.node.server.metrics.value("spolia_key_book_reads_total", outcome="failed") >= 3
        keys.write(KeyBook().to_bytes())
        assert w.node._keys is not None
        watch = w.node._keys
        await until(lambda: not watch.book.keys)
        _, code = await refusal(tokenize(w, shown(keys.of["acme"])))
        assert code is grpc.StatusCode.UNAUTHENTICATED


async def test_a_tenant_at_its_limit_is_told_when_to_come_back_and_others_are_not_in_its_way(
    model: Path, keys: Keys
) -> None:
    keys.limit("acme", max_requests=1)
    decode = FakeDecode("a", hangs)
    async with guarded(model, keys, decode) as w:
        other_key = keys.make("acme")  # a second key is no second limit
        assert w.node._keys is not None
        watch = w.node._keys
        await until(lambda: watch.book.find(other_key) is not None)
        call = w.stub.Generate(text_request("the stones"), timeout=WAIT_S, metadata=shown(keys.of["acme"]))
        await call.read()
        for work in (generate(w, other_key), tokenize(w, shown(other_key))):
            error, code = await refusal(work)
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert isinstance(error, Busy)
            assert error.retry_after_ms > 0
        labels = {"tenant": "acme", "limit": "requests"}
        assert w.node.server.metrics.value("spolia_gateway_limited_total", **labels) == 2
        assert await tokenize(w, shown(keys.of["bolt"]))
        call.cancel()
        await until(lambda: not w.node.gateway.use.requests)
        assert await tokenize(w, shown(other_key))


async def test_tokens_in_flight_are_the_prompts_and_all_that_may_be_generated(model: Path, keys: Keys) -> None:
    keys.limit("acme", max_tokens=60)
    decode = FakeDecode("a", hangs)

    def asking(max_tokens: int, num_samples: int = 1) -> gateway_pb2.GenerateRequest:
        request = text_request("the")
        request.sampling.max_tokens = max_tokens
        request.sampling.num_samples = num_samples
        return request

    async with guarded(model, keys, decode) as w:
        key = keys.of["acme"]
        num_prompt = len(await tokenize(w, shown(key), "the"))
        for too_much in (asking(60), asking(20, 3)):
            error, code = await refusal(generate(w, key, too_much))
            assert (type(error), code) == (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT)
            assert error.field == "sampling.max_tokens"
        call = w.stub.Generate(asking(40), timeout=WAIT_S, metadata=shown(key))
        await call.read()
        held = w.node.gateway.use.tokens["acme"]
        assert num_prompt + 40 <= held <= num_prompt + 41  # a token that begins a text may be added
        error, code = await refusal(generate(w, key, asking(40)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.retry_after_ms > 0
        call.cancel()
        await until(lambda: not w.node.gateway.use.tokens)


async def test_a_warming_holds_the_tokens_of_all_its_documents(model: Path, keys: Keys) -> None:
    text, metadata = "stones " * 10, shown(keys.of["acme"])

    def warming(num_documents: int) -> gateway_pb2.WarmRequest:
        documents = [gateway_pb2.Document(text=f"{number} {text}") for number in range(num_documents)]
        return gateway_pb2.WarmRequest(documents=documents)

    async with guarded(model, keys, FakeDecode("a"), num_prefills=1) as w:
        num_tokens = len(await tokenize(w, metadata, f"0 {text}"))
        keys.limit("acme", max_tokens=num_tokens * 3 // 2)
        await until(lambda: w.node.identities.of(keys.of["acme"]).limits.max_tokens)
        (prefill,) = w.prefills.values()
        prefill.hold = asyncio.Event()
        error, code = await refusal(w.stub.Warm(warming(2), timeout=WAIT_S, metadata=metadata).read())
        assert (type(error), code, error.field) == (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT, "documents")
        call = w.stub.Warm(warming(1), timeout=WAIT_S, metadata=metadata)
        reading = asyncio.ensure_future(call.read())
        await asyncio.wait_for(prefill.started.wait(), WAIT_S)
        assert w.node.gateway.use.tokens["acme"] == num_tokens
        _, code = await refusal(w.stub.Warm(warming(1), timeout=WAIT_S, metadata=metadata).read())
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        prefill.hold.set()
        assert (await reading).num_tokens == num_tokens
        await until(lambda: not w.node.gateway.use.tokens and not w.node.gateway.use.requests)


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


async def test_every_way_a_call_ends_gives_back_what_it_held(model: Path, keys: Keys) -> None:
    keys.limit("acme", max_requests=1, max_tokens=300)
    broken = text_request("the stones")
    broken.sampling.max_tokens = 2**31
    async with guarded(model, keys, FakeDecode("a")) as w:
        key = keys.of["acme"]
        for _ in range(3):
            assert await generate(w, key) > 1
            await refusal(generate(w, key, gateway_pb2.GenerateRequest()))
            await refusal(generate(w, key, broken))
            await refusal(w.stub.Forget(gateway_pb2.ForgetRequest(), timeout=WAIT_S, metadata=shown(key)))
        await until(lambda: not w.node.gateway.use.requests and not w.node.gateway.use.tokens)


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
