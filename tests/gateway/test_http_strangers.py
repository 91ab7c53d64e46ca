"""Those who mean harm, or know no better: how little each gets to hold, and for how long."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from captured_logs import captured_logs
from gateway_fakes import WAIT_S, FakeDecode, hangs
from http_worlds import HttpWorld, chat_model, http_world, says

from spolia_core.key_book import new_key
from spolia_core.key_file import KeyFile
from spolia_gateway.http import connection, connections, request_body, server

ASK = b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n"
JSON = {"content-type": "application/json"}


class Raw:
    """A connection whose bytes are the test's."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def rest(self) -> bytes:
        """All that comes until the server ends the connection."""
        async with asyncio.timeout(WAIT_S):
            return await self.reader.read()

    async def is_answered(self, request: bytes = ASK, status: bytes = b" 200 ") -> bool:
        self.writer.write(request)
        async with asyncio.timeout(WAIT_S):
            return status in await self.reader.readline()


@asynccontextmanager
async def connected(met: HttpWorld) -> AsyncIterator[Raw]:
    host, port = met.world.node.http_address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield Raw(reader, writer)
    finally:
        writer.close()


def ended(met: HttpWorld, reason: str) -> float:
    return met.world.node.server.metrics.value("spolia_http_connections_ended_total", reason=reason)


def num_connections(met: HttpWorld) -> int:
    return len(met.world.node._http._uvicorn.server_state.connections)  # type: ignore[union-attr]  # HTTP is on


async def until(condition: Any) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110  # a count has no event
            await asyncio.sleep(0.01)


@pytest.fixture
async def met(model: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[HttpWorld]:
    """Nothing of it may raise where only the event loop hears."""
    unheard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    monkeypatch.setattr(connections, "WARN_EVERY_S", 0.0)
    async with http_world(model, [FakeDecode("d0", says)], http_max_body_bytes=100_000, rpc_timeout_s=5.0) as made:
        yield made
        await made.http.aclose()
        await until(lambda: num_connections(made) == 0)
    assert not unheard


async def test_a_head_that_does_not_come_is_not_waited_for(met: HttpWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 1.5)
    with captured_logs() as logs:
        async with connected(met) as slow, connected(met) as silent, connected(met) as second:
            assert await second.is_answered()
            for raw, head in ((slow, b"GET /version HTT"), (second, b"GET")):
                raw.writer.write(head)
                assert b" 408 " in await raw.rest()
            assert await silent.rest() == b"", "browsers open connections in case: no answer to what was not asked"
    assert (ended(met, "slow_head"), ended(met, "no_request")) == (2, 1)
    told = [entry["reason"] for entry in logs if entry["event"] == "http connection ended"]
    assert sorted(told) == ["no_request", "slow_head", "slow_head"]


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"a: b\r\n" * 15_000, b" 431 "),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\na: " + b"b" * 100_000, b" 431 "),
        (b"GET /" + b"a" * 100_000, b" 431 "),
        (b"\x16\x03\x01\x02\x00\x01\x00", b" 400 "),
        (b"GET / HTTP/1.1\r\n\r\n", b" 400 "),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\nhost: y\r\n\r\n", b" 400 "),
        (b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n", b" 400 "),
        (b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", b" 400 "),
    ],
)
async def test_a_head_that_is_none_is_refused_counted_and_logged(met: HttpWorld, head: bytes, status: bytes) -> None:
    with captured_logs() as logs:
        async with connected(met) as raw:
            raw.writer.write(head)
            answer = await raw.rest()
    assert status in answer.split(b"\r\n")[0]
    assert b'"error"' in answer
    assert ended(met, "bad_head") == 1
    assert [entry["reason"] for entry in logs if entry["event"] == "http connection ended"] == ["bad_head"]


async def test_a_body_of_two_lengths_is_refused_as_a_smuggler_would_send_it(met: HttpWorld) -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    async with connected(met) as raw:
        raw.writer.write(head + b"0\r\n\r\n" + ASK)
        answer = await raw.rest()
    assert b" 400 " in answer.split(b"\r\n")[0]
    assert b"transfer-encoding" in answer
    assert answer.count(b"HTTP/1.1 ") == 1, "what follows is nobody's request"


async def test_a_chunk_that_is_none_ends_the_connection_before_and_under_an_answer(met: HttpWorld) -> None:
    for path, status in ((b"/v1/completions", b" 400 "), (b"/nothing", b" 404 ")):
        async with connected(met) as raw:
            head = b"POST " + path + b" HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n"
            raw.writer.write(head)
            await asyncio.sleep(0.05)
            raw.writer.write(b"no length\r\n")
            assert status in (await raw.rest()).split(b"\r\n")[0]


async def test_a_handler_whose_request_breaks_off_is_told_so_and_answers_nobody(
    met: HttpWorld, caplog: pytest.LogCaptureFixture
) -> None:
    """All in one packet, so that the handler begins when the refusal has been sent."""
    async with connected(met) as raw:
        raw.writer.write(
            b"POST /nothing HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nno length\r\n"
        )
        assert b" 400 " in (await raw.rest()).split(b"\r\n")[0]
    async with asyncio.timeout(WAIT_S):
        while tasks := met.world.node._http._uvicorn.server_state.tasks:  # type: ignore[union-attr]  # HTTP is on
            await asyncio.wait(tasks)
    assert not [record for record in caplog.records if record.name == "uvicorn.error"]


async def test_what_tls_hands_over_after_the_end_is_dropped(met: HttpWorld) -> None:
    async with connected(met) as raw:
        await until(lambda: num_connections(met) == 1)
        (held,) = met.world.node._http._uvicorn.server_state.connections  # type: ignore[union-attr]  # HTTP is on
        held.refuse(503, connection.Ending.TOO_MANY, "no place")  # type: ignore[union-attr]  # all are of ours
        held.data_received(ASK)
        assert (await raw.rest()).count(b"HTTP/1.1") == 1


async def test_requests_sent_ahead_are_answered_in_their_order(met: HttpWorld) -> None:
    async with connected(met) as raw:
        raw.writer.write(ASK * 50 + b"GET /nothing HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        answers = await raw.rest()
    assert re.findall(rb"HTTP/1.1 (\d+) ", answers) == [b"200"] * 50 + [b"404"]


async def test_the_key_is_asked_for_before_the_body_is_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, record = new_key("acme")
    place = KeyFile(tmp_path / "keys.json")
    place.change(lambda book: book.with_key(record))
    limits = {"http_max_body_bytes": 1000, "rpc_timeout_s": 60.0}
    monkeypatch.setattr(request_body, "LINGER_S", 0.2)
    async with http_world(model, [FakeDecode("a", says)], keys=place.name, **limits) as met:
        for path in (b"/v1/completions", b"/v1/chat/completions", b"/tokenize"):
            for shown, status in ((b"Bearer wrong", b" 401 "), (b"Bearer " + key.encode(), b" 413 ")):
                async with connected(met) as raw:
                    lines = (b"POST " + path + b" HTTP/1.1", b"host: localhost", b"authorization: " + shown)
                    raw.writer.write(b"\r\n".join((*lines, b"content-length: 5000", b"", b"")))
                    began = time.monotonic()
                    answer = await raw.rest()
                    assert status in answer.split(b"\r\n")[0], "though nothing of the body came"
                    assert b"connection: close" in answer.lower()
                    assert time.monotonic() - began < WAIT_S / 4
        metrics = met.world.node.server.metrics
        assert metrics.value("spolia_gateway_refused_total", reason="unknown_key") == 3


async def test_who_sends_all_before_reading_hears_why_it_was_refused(met: HttpWorld) -> None:
    for path, num_bytes, status in (("/nothing", 90_000, 404), ("/v1/completions", 200_000, 413)):
        answer = await met.http.post(path, content=b"x" * num_bytes)
        assert answer.status_code == status
        assert answer.headers["connection"] == "close"
    assert (await met.http.get("/version")).status_code == 200


async def test_a_body_without_end_is_not_taken_for_ever(met: HttpWorld) -> None:
    async with connected(met) as raw:
        raw.writer.write(b"POST /nothing HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")

        async def send_on() -> None:
            while True:
                raw.writer.write(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")
                await raw.writer.drain()

        with pytest.raises(ConnectionError):
            await asyncio.wait_for(send_on(), WAIT_S)


async def test_in_a_crowd_that_comes_at_once_nobody_loses_a_request(model: Path) -> None:
    async with http_world(model, [FakeDecode("a", says)], max_connections=3) as met:
        host, port = met.world.node.http_address.split(":")
        with ExitStack() as held, captured_logs() as logs:  # the loop takes all of these in one turn
            crowd = [held.enter_context(socket.create_connection((host, int(port)), WAIT_S)) for _ in range(12)]
            for each in crowd:
                each.sendall(ASK)
            answers = [(await asyncio.to_thread(each.recv, 4096)).split(b"\r\n")[0] for each in crowd]
        assert [b" 200 " in answer for answer in answers] == [True] * 3 + [False] * 9
        assert all(b" 503 " in answer for answer in answers[3:])
        assert (ended(met, "too_many"), ended(met, "gave_way")) == (9, 0)
        assert len([entry for entry in logs if entry["event"] == "http connection ended"]) == 1, "one a second"


async def test_among_too_many_connections_the_one_that_waited_longest_goes(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "GRACE_S", 0.0)
    async with (
        http_world(model, [FakeDecode("a", says)], max_connections=3) as met,
        connected(met) as first,
        connected(met) as second,
        connected(met) as third,
    ):
        for raw in (first, second, third, first):
            assert await raw.is_answered(
                b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n", b"" if raw is first else b" 200 "
            )
            await until(lambda: num_connections(met) == 3)
        async with connected(met) as fourth:
            assert await fourth.is_answered()
            assert await second.rest(), "the rest of its answer, and the end"
            assert not first.reader.at_eof()
            assert not third.reader.at_eof()
        assert ended(met, "gave_way") == 1


async def test_where_every_connection_is_being_answered_a_new_one_is_told_to_come_back(model: Path) -> None:
    decode = FakeDecode("a", hangs)
    async with http_world(model, [decode], max_connections=2) as met:
        body = b'{"prompt": "x"}'
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        ask = head + b"content-length: 15\r\n\r\n"
        async with connected(met) as one, connected(met) as other:
            for raw in (one, other):
                raw.writer.write(ask + body)
            await until(lambda: decode.num_running == 2)
            async with connected(met) as late:
                answer = await late.rest()
                assert b" 503 " in answer.split(b"\r\n")[0]
                assert b"retry-after: 1" in answer.lower()
            assert ended(met, "too_many") == 1
            host, port = met.world.node.http_address.split(":")
            with ExitStack() as held:  # the loop takes all of these in one turn
                crowd = [held.enter_context(socket.create_connection((host, int(port)))) for _ in range(8)]
                await until(lambda: ended(met, "too_many") == 1 + len(crowd))
                for each in crowd:
                    each.settimeout(WAIT_S)
                    assert b" 503 " in await asyncio.to_thread(each.recv, 4096)
            assert ended(met, "gave_way") == 0
            assert num_connections(met) == 2
        await until(lambda: decode.num_running == 0)
        async with connected(met) as again:
            assert await again.is_answered()
        with captured_logs():
            await until(lambda: met.world.node.gateway.num_running == 0)


async def test_who_asks_and_reads_nothing_is_let_go(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "READER_TIMEOUT_S", 0.5)
    async with http_world(model, [FakeDecode("a", says)]) as met:
        host, port = met.world.node.http_address.split(":")
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect((host, int(port)))
            deaf.sendall(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n" * 200)
            await until(lambda: num_connections(met) == 1)
            await until(lambda: num_connections(met) == 0)


@pytest.mark.parametrize("depth", [400, 5_000, 10_000, 100_000])
async def test_json_nested_without_end_is_refused_or_answered(tmp_path: Path, depth: int) -> None:
    chat = '"messages": [{"role": "user", "content": "x"}], "max_tokens": 2'
    nested = '{"a":' * depth + "1" + "}" * depth
    tool = '{"type": "function", "function": {"name": "f", "parameters": %s}}'
    schema = '{"type": "json_schema", "json_schema": {"name": "a", "schema": %s}}'
    bodies = [nested, *(f'{{{chat}, "{field}": {nested}}}' for field in ("metadata", "chat_template_kwargs"))]
    bodies += [f'{{{chat}, "tools": [{tool % nested}]}}', f'{{{chat}, "response_format": {schema % nested}}}']
    bodies.append(f'{{{chat}, "seed": {"9" * depth}}}')
    async with http_world(chat_model(tmp_path), [FakeDecode("a", says)]) as met:
        for body in bodies:
            answer = await met.http.post("/v1/chat/completions", content=body.encode(), headers=JSON)
            assert answer.status_code in (200, 400), (depth, body[:100], answer.text[:300])
            error = answer.json()["error"] if depth >= 10_000 else {}
            if depth == 10_000:
                assert error["code"] == "invalid_json" or error["param"] == "seed", answer.text[:300]
            if depth == 100_000:
                assert "strings; at most 32768" in error["message"] or error["param"] == "seed", answer.text[:300]


async def test_a_result_of_a_call_that_nobody_made_is_refused_by_name(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "tool", "tool_call_id": "none", "content": "4"}]
    async with http_world(chat_model(tmp_path), [FakeDecode("a", says)]) as met:
        answer = await met.http.post("/v1/chat/completions", json={"messages": messages})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages[1].tool_call_id")


async def test_over_grpc_too_the_key_is_asked_for_before_a_message_is_taken(model: Path, tmp_path: Path) -> None:
    place = KeyFile(tmp_path / "keys.json")
    place.change(lambda book: book.with_key(new_key("acme")[1]))
    async with http_world(model, [FakeDecode("a", says)], keys=place.name) as met:
        async with grpc.aio.insecure_channel(met.world.node.server.address) as channel:
            for method in ("Generate", "Tokenize"):
                call = channel.stream_stream(f"/spolia.v1.GatewayService/{method}")(timeout=WAIT_S)
                assert await call.code() is grpc.StatusCode.UNAUTHENTICATED, "no message came, and none will"
        metrics = met.world.node.server.metrics
        assert metrics.value("spolia_gateway_refused_total", reason="no_key") == 2
        labels = {"service": "spolia.v1.GatewayService", "method": "Generate", "code": "UNAUTHENTICATED"}
        assert metrics.value("spolia_rpc_requests_total", **labels) == 1


async def test_grpc_has_as_many_connections_as_it_may(model: Path) -> None:
    async with http_world(model, [FakeDecode("a", says)], max_connections=2) as met:
        host, port = met.world.node.server.address.split(":")
        held = [await asyncio.open_connection(host, int(port)) for _ in range(2)]
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            async with asyncio.timeout(WAIT_S):
                assert await reader.read() == b""
        finally:
            for _, each in (*held, (reader, writer)):
                each.close()
