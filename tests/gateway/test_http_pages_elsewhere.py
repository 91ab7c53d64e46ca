"""Where nobody shows a key, a page of elsewhere in a browser of this machine is no user of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from captured_logs import captured_logs, one
from gateway_fakes import WAIT_S, FakeDecode
from http_worlds import HttpWorld, http_world, says
from key_worlds import Keys

from spolia_core.errors import InvalidRequest
from spolia_gateway.config import GatewayConfig
from spolia_gateway.own_names import OwnNames

ASK = {"prompt": "the stones"}
OWN_HOSTS = [
    "localhost",
    "localhost:8000",
    "LOCALHOST:8000",
    "localhost.",
    "spolia.localhost:8000",
    "127.0.0.1:8000",
    "127.8.8.8",
    "[::1]:8000",
    "[0:0:0:0:0:0:0:1]",
]
OTHER_HOSTS = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example:8000",
    "notlocalhost",
    "0.0.0.0:8000",
    "10.0.0.7:8000",
    "192.168.1.4",
    "[fe80::1]:8000",
    "2130706433",
    "0x7f.1",
    "127.1",
    "::1",
    ":8000",
    "",
    "user@localhost",
    "localhost/",
    "localhost:8000:8000",
    "localhost evil.example",
]
OTHER_ORIGINS = [
    "https://evil.example",
    "http://evil.example:8000",
    "http://localhost.evil.example",
    "http://localhost@evil.example",
    "null",
    "",
    "http://[::1",
    "chrome-extension://abcdefgh",
    "http://0.0.0.0:8000",
]
OWN_ORIGINS = ["http://localhost:8000", "http://127.0.0.1:3000", "https://[::1]", "tauri://localhost"]


@pytest.fixture
async def met(model: Path) -> AsyncIterator[HttpWorld]:
    async with http_world(model, [FakeDecode("d0", says)]) as made:
        yield made


def refusals(met: HttpWorld, reason: str) -> float:
    return met.world.node.server.metrics.value("spolia_gateway_refused_total", reason=reason)


async def ask(met: HttpWorld, **headers: str) -> Any:
    return await met.http.post("/v1/completions", json=ASK, headers=headers)


@pytest.mark.parametrize("host", OWN_HOSTS)
def test_names_of_this_machine_are_its_own(host: str) -> None:
    assert OwnNames(()).stranger(host, None) is None


@pytest.mark.parametrize("host", OTHER_HOSTS)
def test_every_other_name_is_not_however_it_is_written(host: str) -> None:
    found = OwnNames(("proxy.example",)).stranger(host, None)
    assert found is not None
    assert found.header == "host"


@pytest.mark.parametrize("origin", OWN_ORIGINS)
def test_pages_of_this_machine_are_its_own(origin: str) -> None:
    assert OwnNames(()).stranger("localhost", origin) is None


@pytest.mark.parametrize("origin", OTHER_ORIGINS)
def test_every_other_page_is_not(origin: str) -> None:
    found = OwnNames(("proxy.example",)).stranger("localhost", origin)
    assert found is not None
    assert found.header == "origin"


def test_names_that_are_given_are_own_too_as_hosts_and_as_pages() -> None:
    names = OwnNames(("Ai.example", "10.0.0.7", "[fe80::1]", "abcdefgh"))
    for host in ("ai.example", "AI.EXAMPLE:443", "10.0.0.7:80", "[fe80::1]:80"):
        assert names.stranger(host, None) is None
    for origin in ("https://ai.example", "chrome-extension://abcdefgh", "http://10.0.0.7"):
        assert names.stranger("localhost", origin) is None
    assert names.stranger("www.ai.example", None), "a name stands for itself, not for what is below it"
    assert OwnNames(("*",)).stranger("evil.example", "https://evil.example") is None


def test_a_client_of_http_1_0_may_tell_no_host() -> None:
    assert OwnNames(()).stranger(None, None) is None


async def test_a_page_whose_name_was_made_to_mean_this_machine_gets_nothing(
    met: HttpWorld,
) -> None:
    decode = met.world.decodes["d0"]
    for path in ("/", "/health", "/version", "/metrics", "/cluster", "/v1/models", "/openapi.json", "/nothing"):
        answer = await met.http.get(path, headers={"host": "evil.example:8000"})
        assert answer.status_code == 421, path
        assert answer.headers["x-request-id"]
        assert answer.json()["error"]["code"] == "host_not_served"
    with captured_logs() as lines:
        answer = await ask(met, host="evil.example")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (421, "host_not_served", "invalid_request_error")
    for word in ("'evil.example'", "http_allowed_hosts", "--http-allowed-hosts", "SPOLIA_HTTP_ALLOWED_HOSTS"):
        assert word in error["message"]
    assert one(lines, "caller refused")["reason"] == "host"
    assert refusals(met, "host") == 9
    assert not decode.requests


async def test_a_page_of_elsewhere_has_no_request_sent_whatever_its_kind(met: HttpWorld) -> None:
    """Text and forms are sent without asking first; of the others a browser asks, with OPTIONS."""
    body = json.dumps(ASK).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json", None):
        headers = {"origin": "https://evil.example"} | ({} if kind is None else {"content-type": kind})
        answer = await met.http.post("/v1/completions", content=body, headers=headers)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (403, "origin_not_allowed"), kind
        assert "'https://evil.example'" in error["message"]
        assert "http_allowed_hosts" in error["message"]
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert (await met.http.get("/cluster", headers={"origin": "https://evil.example"})).status_code == 403
    wanted = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    asked_first = await met.http.request("OPTIONS", "/v1/completions", headers=wanted)
    assert asked_first.status_code == 403
    assert not [name for name in asked_first.headers if name.startswith("access-control-")]
    assert refusals(met, "origin") == 6
    assert not met.world.decodes["d0"].requests


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
async def test_a_body_that_a_form_could_send_is_no_request(met: HttpWorld, kind: str | None) -> None:
    """Of an old browser that tells no origin for what it sends, or of a page of this machine's."""
    headers = {} if kind is None else {"content-type": kind}
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        answer = await met.http.post(path, content=json.dumps(ASK).encode(), headers=headers)
        assert answer.status_code == 400, (path, kind, answer.text)
        assert "content-type application/json" in answer.json()["error"]["message"]
    assert not met.world.decodes["d0"].requests


async def test_the_own_page_asks_as_before(met: HttpWorld) -> None:
    own = f"http://{met.world.node.http_address}"
    assert (await ask(met, origin=own)).status_code == 200
    assert (await met.http.get("/", headers={"host": "localhost:8000"})).status_code == 200
    assert (await ask(met, host="localhost:8000", origin="http://localhost:8000")).status_code == 200


async def test_a_refusal_takes_nothing_of_the_body(met: HttpWorld) -> None:
    host, port = met.world.node.http_address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: evil.example\r\nexpect: 100-continue\r\n")
        writer.write(b"content-length: 1000000\r\n\r\n")
        async with asyncio.timeout(WAIT_S):
            answer = await reader.read()
    finally:
        writer.close()
    assert answer.startswith(b"HTTP/1.1 421 ")
    assert b"connection: close" in answer


async def test_a_prober_of_http_1_0_is_answered(met: HttpWorld) -> None:
    host, port = met.world.node.http_address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(b"GET /health HTTP/1.0\r\n\r\n")
        async with asyncio.timeout(WAIT_S):
            assert b" 200 " in await reader.readline()
    finally:
        writer.close()


async def test_names_of_the_setting_are_served(model: Path) -> None:
    allowed = ("ai.example", "abcdefgh")
    async with http_world(model, [FakeDecode("d0", says)], http_allowed_hosts=allowed) as met:
        assert (await ask(met, host="ai.example", origin="https://ai.example")).status_code == 200
        assert (await ask(met, origin="chrome-extension://abcdefgh")).status_code == 200
        assert (await ask(met, host="evil.example")).status_code == 421
    async with http_world(model, [FakeDecode("d0", says)], http_allowed_hosts=("*",)) as met:
        assert (await ask(met, host="evil.example", origin="https://evil.example")).status_code == 200


async def test_who_shows_a_key_may_come_under_any_name(model: Path, keys: Keys) -> None:
    """A browser has none to give away; and a gateway with keys may stand behind a proxy that keeps names."""
    shown, name = {"authorization": f"Bearer {keys.of['acme']}"}, keys.place.name
    async with http_world(model, [FakeDecode("d0", says)], keys=name) as met:
        assert (await ask(met, host="ai.example", origin="https://ai.example", **shown)).status_code == 200
        assert (await ask(met, host="ai.example")).status_code == 401
    async with http_world(model, [FakeDecode("d0", says)], keys=name, allow_anonymous=True) as met:
        assert (await ask(met, host="evil.example")).status_code == 421, "who needs none may not"


async def test_who_listens_for_other_machines_is_called_by_names_it_does_not_know(model: Path) -> None:
    """A pod's address in a kubelet's probe, a service's name, whatever a balancer passes on."""
    outside: dict[str, Any] = {
        "host": "0.0.0.0",
        "advertise_host": "127.0.0.1",
        "cluster_secret": "s3cret",
        "allow_plaintext": True,
        "allow_anonymous": True,
        "http_allowed_hosts": ("ai.example",),
    }
    with captured_logs() as lines:
        async with http_world(model, [FakeDecode("d0", says)], **outside) as met:
            assert (await met.http.get("/health", headers={"host": "10.0.0.7:8000"})).status_code == 200
            assert (await ask(met, host="gateway.spolia.svc", origin="https://ai.example")).status_code == 200
    assert [line for line in lines if line["event"].startswith("http_allowed_hosts counts for nothing")]


def test_a_node_that_is_told_its_name_answers_to_it() -> None:
    config = GatewayConfig(advertise_host="laptop.lan")
    assert config.own_names is not None
    assert config.own_names.stranger("laptop.lan:8000", None) is None
    assert config.own_names.stranger("other.lan:8000", None)


@pytest.mark.parametrize(
    "name", ["http://ai.example", "ai.example:443", "*.ai.example", "a b", "", "a..b", "ai.example/x"]
)
def test_what_is_no_name_stops_the_start(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        GatewayConfig(http_allowed_hosts=("good.example", name))
    assert caught.value.field == "http_allowed_hosts"
