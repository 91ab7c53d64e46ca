"""Keys over HTTP, as the official client shows them and is told of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import httpx2
import openai
import pytest
from gateway_fakes import WAIT_S, FakeDecode, hangs
from http_worlds import HttpWorld, http_world, says

from spolia.local_authority import init_authority
from spolia_core.key_book import Role, TenantLimits, new_key
from spolia_core.key_file import KeyFile

API = (
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("POST", "/tokenize"),
    ("GET", "/metrics"),
)
ASKED = {"model": "tiny", "prompt": "the stones", "max_tokens": 3}


@pytest.fixture
def keys(tmp_path: Path) -> tuple[KeyFile, str]:
    place = KeyFile(tmp_path / "keys.json")
    key, record = new_key("acme")
    place.change(lambda book: book.with_key(record))
    return place, key


@asynccontextmanager
async def guarded(model: Path, place: KeyFile, decode: FakeDecode, **changes: object) -> AsyncIterator[HttpWorld]:
    async with http_world(model, [decode], keys=place.name, **changes) as w:
        yield w


async def test_the_official_clients_key_is_its_tenant(model: Path, keys: tuple[KeyFile, str]) -> None:
    (place, key), decode = keys, FakeDecode("a", says)
    async with guarded(model, place, decode) as w:
        client = w.openai.with_options(api_key=key)
        assert (await client.completions.create(**ASKED)).choices[0].text
        assert [model.id async for model in client.models.list()] == ["tiny"]
    assert [request.tenant_id for request in decode.requests] == ["acme"]


async def test_without_a_good_key_every_route_of_the_api_is_refused_and_no_other(
    model: Path, keys: tuple[KeyFile, str]
) -> None:
    place, _ = keys
    async with guarded(model, place, FakeDecode("a", says)) as w:
        with pytest.raises(openai.AuthenticationError) as caught:
            await w.openai.completions.create(**ASKED)
        assert caught.value.code == "invalid_api_key"
        for method, route in API:
            answer = await w.http.request(method, route, json=ASKED)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), (method, route)
        for route in ("/health", "/version"):
            assert (await w.http.get(route)).status_code == 200
        refused = w.world.node.server.metrics.value("spolia_gateway_refused_total", reason="unknown_key")
        assert refused == 1  # the official client's; the others sent none


async def test_a_tenant_at_its_limit_gets_429_and_a_time_to_come_back(model: Path, keys: tuple[KeyFile, str]) -> None:
    place, key = keys
    place.change(lambda book: book.with_limits("acme", TenantLimits(max_requests=1)))
    async with guarded(model, place, FakeDecode("a", hangs)) as w:
        client = w.openai.with_options(api_key=key)
        stream = await client.completions.create(**ASKED, stream=True)
        await anext(aiter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            await client.completions.create(**ASKED)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        await stream.close()


async def test_metrics_name_tenants_and_are_for_operators(model: Path, keys: tuple[KeyFile, str]) -> None:
    place, key = keys
    operators, record = new_key("ops", frozenset({Role.OPERATOR}))
    place.change(lambda book: book.with_key(record))
    async with guarded(model, place, FakeDecode("a", says)) as w:
        for shown, status in ((key, 403), (operators, 200)):
            answer = await w.http.get("/metrics", headers={"authorization": f"Bearer {shown}"})
            assert answer.status_code == status


async def test_http_is_under_tls_where_nodes_are(model: Path, keys: tuple[KeyFile, str], tmp_path: Path) -> None:
    place, key = keys
    init_authority(tmp_path / "public", timedelta(days=1))
    for ending in ("crt", "key"):
        (tmp_path / "public" / f"gateway.{ending}").rename(tmp_path / "public" / f"tls.{ending}")
    async with guarded(model, place, FakeDecode("a", says), public_tls_dir=tmp_path / "public") as w:
        address = w.world.node.http_address
        believed = httpx2.create_ssl_context(verify=str(tmp_path / "public" / "ca.crt"))
        async with httpx2.AsyncClient(verify=believed, timeout=WAIT_S) as client:
            headers = {"authorization": f"Bearer {key}"}
            assert (await client.get(f"https://{address}/v1/models", headers=headers)).status_code == 200
        with pytest.raises(httpx2.TransportError):
            await w.http.get("/health")
