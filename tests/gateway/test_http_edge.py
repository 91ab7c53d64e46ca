"""What HTTP itself may do wrong, and what those who run a gateway ask of it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gateway_fakes import WAIT_S, FakeDecode, hangs
from gateway_worlds import world
from http_worlds import HttpWorld, http_world, says

from spolia.version import __version__
from spolia_core.errors import InvalidRequest
from spolia_gateway.config import GatewayConfig
from spolia_gateway.node import GatewayNode


@pytest.fixture
async def met(model: Path) -> AsyncIterator[HttpWorld]:
    async with http_world(model, [FakeDecode("d0", says)], http_max_body_bytes=2000) as made:
        yield made


async def raw(met: HttpWorld, request: bytes) -> bytes:
    """What comes back for bytes as they are, until the server closes the connection."""
    host, port = met.world.node.http_address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(request)
        await writer.drain()
        async with asyncio.timeout(WAIT_S):
            return await reader.read()
    finally:
        writer.close()


async def test_what_a_gateway_is_asked_by_those_who_run_it(met: HttpWorld) -> None:
    assert (await met.http.get("/health")).json() == {"status": "serving"}
    assert (await met.http.get("/version")).json() == {"version": __version__}
    metrics = await met.http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert "spolia_time_to_first_token_seconds_count" in metrics.text
    assert 'spolia_http_requests_total{route="/health",status="200"} 1.0' in metrics.text
    asked_by_a_balancer = await met.http.head("/health")
    assert (asked_by_a_balancer.status_code, asked_by_a_balancer.content) == (200, b"")
    schema = (await met.http.get("/openapi.json")).json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize"} <= schema["paths"].keys()


async def test_models_are_listed_as_openai_lists_them(met: HttpWorld) -> None:
    [model] = (await met.openai.models.list()).data
    assert (model.id, model.object) == ("tiny", "model")
    assert (await met.openai.models.retrieve("tiny")).id == "tiny"
    for name in ("none", "tiny/"):
        missing = await met.http.get(f"/v1/models/{name}")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


async def test_unknown_urls_and_methods_get_errors_of_the_same_form(met: HttpWorld) -> None:
    for method, url, status, code in (
        ("GET", "/nothing", 404, "unknown_url"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
    ):
        answer = await met.http.request(method, url)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert answer.headers["x-request-id"]
    assert "unmatched" in await met.metric('spolia_http_requests_total{route="unmatched"')


@pytest.mark.parametrize(
    ("method", "asked", "served"),
    [
        ("POST", "/v1/chat/completions/", "/v1/chat/completions"),
        ("POST", "/v1/completions/", "/v1/completions"),
        ("POST", "/v1//completions", "/v1/completions"),
        ("POST", "//v1/completions//", "/v1/completions"),
        ("POST", "/tokenize/", "/tokenize"),
        ("GET", "/v1/models/", "/v1/models"),
        ("GET", "/health/", "/health"),
        ("HEAD", "/health/", "/health"),
        ("GET", "/metrics/", "/metrics"),
        ("GET", "/cluster/", "/cluster"),
        ("GET", "/page/main.js/", "/page/main.js"),
        ("GET", "/openapi.json/", "/openapi.json"),
        ("GET", "//", "/"),
        ("GET", "/nothing/", None),
        ("GET", "/v1/", None),
    ],
)
async def test_a_slash_too_many_is_no_redirect_and_the_path_that_is_served_is_named(
    met: HttpWorld, method: str, asked: str, served: str | None
) -> None:
    """A redirect names the host of whoever asked, a proxy's inner one maybe, and clients follow it without the body or
    the key.
    """
    body = json.dumps({"prompt": "x"}).encode() if method == "POST" else b""
    head = f"{method} {asked} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    head += f"content-length: {len(body)}\r\n\r\n"
    answer = await raw(met, head.encode() + body)
    told, _, content = answer.partition(b"\r\n\r\n")
    assert told.startswith(b"HTTP/1.1 404 "), told
    assert b"\r\nlocation:" not in told.lower()
    if method == "HEAD":
        assert not content
        return
    error = json.loads(content)["error"]
    assert error["code"] == "unknown_url"
    named = f"; {served} is" if served else ""
    assert error["message"] == f"{method} {asked} is not served: Not Found{named}"


async def test_bodies_that_are_none_are_told_so(met: HttpWorld) -> None:
    as_json = {"content-type": "application/json"}
    for content, headers, words in (
        (b"{nope", as_json, "no JSON"),
        (b"\xff\xfe", as_json, "JSON"),
        (b"[]", as_json, "JSON object"),
        (b'{"prompt": "x"}', {"content-type": "text/plain"}, "content-type application/json"),
        (b"", as_json, "JSON"),
    ):
        answer = await met.http.post("/v1/completions", content=content, headers=headers)
        assert answer.status_code == 400, answer.text
        assert words in answer.json()["error"]["message"], answer.text


async def test_a_body_that_is_packed_is_refused_and_one_that_says_it_is_not_is_taken(met: HttpWorld) -> None:
    for encoding, status in (("gzip", 415), ("identity, br", 415), ("Identity", 200)):
        headers = {"content-encoding": encoding}
        answer = await met.http.post("/v1/completions", json={"prompt": "x"}, headers=headers)
        assert answer.status_code == status, answer.text
        if status == 415:
            error = answer.json()["error"]
            assert error["code"] == "unsupported_content_encoding"
            assert encoding in error["message"]


async def test_a_body_too_large_is_refused_unread(met: HttpWorld) -> None:
    answer = await met.http.post("/v1/completions", json={"prompt": "x" * 3000})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(4):
            yield b" " * 600

    answer = await met.http.post("/v1/completions", content=chunks())
    assert answer.status_code == 413, "also where no length was told before"
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999\r\n\r\n"
    assert b" 413 " in (await raw(met, head)).split(b"\r\n")[0]


async def test_a_body_that_does_not_come_is_not_waited_for(model: Path) -> None:
    async with http_world(model, [FakeDecode("d0", says)], rpc_timeout_s=0.5) as met:
        answer = await raw(
            met, b'POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{"prompt"'
        )
    assert b" 408 " in answer.split(b"\r\n")[0]
    assert b"body_too_slow" in answer


async def test_a_request_id_that_cannot_travel_is_refused(met: HttpWorld) -> None:
    for bad in ("x" * 129, "caf\u00e9"):
        answer = await met.http.get("/version", headers={"x-request-id": bad.encode()})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == "x-request-id"
        assert error["message"].startswith("x-request-id ")
        assert answer.headers["x-request-id"] != bad


async def test_numbers_json_does_not_know_are_refused(met: HttpWorld) -> None:
    for number in ("NaN", "Infinity", "1e999"):
        content = f'{{"prompt": "x", "temperature": {number}}}'.encode()
        headers = {"content-type": "application/json"}
        answer = await met.http.post("/v1/completions", content=content, headers=headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "temperature")


async def test_text_that_is_no_unicode_is_refused(met: HttpWorld) -> None:
    headers = {"content-type": "application/json"}
    for field in ("prompt", "stop", "model", "cache_salt"):
        whole = json.dumps({"prompt": "\U0001f600"} | {field: "x\udfff"})
        for content in (whole.encode(), whole.replace("\\udfff", "\udfff").encode("utf-8", "surrogatepass")):
            answer = await met.http.post("/v1/completions", content=content, headers=headers)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, field)
            assert error["message"].startswith(f"{field} holds half a character")
    turns = json.dumps({"messages": [{"role": "user", "content": "\ud800"}]}).encode()
    answer = await met.http.post("/v1/chat/completions", content=turns, headers=headers)
    assert answer.json()["error"]["param"] == "messages[0].content"
    for key in ('"\\ud800": 1', '"stop": ["\\ud800"]'):
        answer = await met.http.post("/v1/completions", content=f"{{{key}}}".encode(), headers=headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stop[0]" if "stop" in key else None)


async def test_numbers_and_nesting_beyond_what_is_read_are_told_in_words_of_http(model: Path) -> None:
    headers = {"content-type": "application/json"}
    async with http_world(model, [FakeDecode("d0", says)]) as met:
        for content, param, words in (
            (f'{{"seed": -{"7" * 4301}}}', "seed", "seed has a number of 4301 digits; at most 4300 are read"),
            (f'{{"prompt": [1, {"7" * 4301}]}}', "prompt[1]", "prompt[1] has a number of 4301 digits"),
            ("[" * 60_000, None, "the body is no JSON that can be read: it is nested too deep"),
        ):
            answer = await met.http.post("/v1/completions", content=content.encode(), headers=headers)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, param)
            assert error["message"].startswith(words)


async def test_a_node_about_to_drain_answers_and_ends_the_connection(model: Path) -> None:
    async with http_world(model, [FakeDecode("d0")], drain_timeout_s=5.0, drain_delay_s=2.5) as met:
        assert "connection" not in (await met.http.get("/version")).headers
        drain = asyncio.ensure_future(met.world.node.server.drain())
        await asyncio.sleep(0)
        answer = await met.http.post("/v1/completions", json={"prompt": "x"})
        assert answer.status_code == 200, answer.text
        assert answer.headers["connection"] == "close"
        assert await drain


async def test_a_draining_node_says_so_and_cuts_what_is_late(model: Path) -> None:
    decode = FakeDecode("d0", hangs)
    async with http_world(model, [decode], drain_timeout_s=3.0) as met:
        stream = asyncio.ensure_future(met.http.post("/v1/completions", json={"prompt": "x", "stream": True}))
        await decode.started.wait()
        drain = asyncio.ensure_future(met.world.node.server.drain())
        await asyncio.sleep(0)
        assert (await met.http.get("/health")).status_code == 503
        refused = await met.http.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        assert refused.headers["connection"] == "close", "the next request is to go elsewhere"
        assert await drain, "the drain was clean"
        answer = await stream
        last = json.loads(answer.text.strip().split("\n\n")[-1].removeprefix("data: "))
        assert last["error"]["code"] == "unavailable"
        async with asyncio.timeout(WAIT_S):
            while decode.num_running:  # noqa: ASYNC110 - the cancel is on its way to another node
                await asyncio.sleep(0.01)


async def takes_connections(address: str) -> bool:
    try:
        _, writer = await asyncio.open_connection(*address.split(":"))
    except ConnectionRefusedError:
        return False
    except ConnectionResetError:  # the listener ended with this one in its queue
        return True
    writer.close()
    return True


async def test_a_long_answer_over_http_keeps_no_caller_over_grpc_and_is_counted(model: Path) -> None:
    decode = FakeDecode("d0", hangs)
    async with http_world(model, [decode], drain_timeout_s=3.0) as met:
        stream = asyncio.ensure_future(met.http.post("/v1/completions", json={"prompt": "x", "stream": True}))
        await decode.started.wait()
        drain = asyncio.ensure_future(met.world.node.server.drain())
        while await takes_connections(met.world.node.server.address):
            assert not drain.done()
        assert not drain.done()
        told = await met.http.get(f"http://{met.world.node.server.metrics_address}/metrics")
        assert told.status_code == 200
        assert await drain
        assert "unavailable" in (await stream).text


async def test_a_port_that_is_taken_stops_the_start(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        node = GatewayNode(GatewayConfig(port=0, http_port=port, directory="127.0.0.1:9", model=model))
        try:
            with pytest.raises(InvalidRequest, match=f"http_port {port} cannot be bound"):
                await node.start()
        finally:
            await node.server.stop_at_once()
            await node.close()


async def test_tokens_are_not_held_back_for_acknowledgements(met: HttpWorld) -> None:
    await met.http.get("/version")
    server = met.world.node._http._uvicorn.server_state  # type: ignore[union-attr]  # HTTP is on
    [connection] = server.connections
    taken = connection.transport.get_extra_info("socket")  # type: ignore[union-attr]  # it is open
    assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_http_can_be_off(model: Path) -> None:
    async with world(model, decodes=[FakeDecode("d0", says)], http_port=-1) as made:
        assert made.node.http_address == ""
