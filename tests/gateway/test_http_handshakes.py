"""TLS handshakes of HTTP clients: counted from the beginning, ended by a deadline, and nobody else waits for them."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from captured_logs import captured_logs
from gateway_fakes import WAIT_S, FakeDecode
from http_worlds import HttpWorld, http_world, says

from spolia.local_authority import init_authority
from spolia_gateway.http import connections, tls_door

ASK = b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n"


@dataclass
class Guarded:
    """A gateway that speaks TLS, and a client that believes it."""

    met: HttpWorld
    https: httpx2.AsyncClient
    trust: ssl.SSLContext

    @property
    def place(self) -> tuple[str, int]:
        host, port = self.met.world.node.http_address.split(":")
        return host, int(port)

    @property
    def num_connections(self) -> float:
        return self.met.world.node.server.metrics.value("spolia_http_connections")

    @property
    def doors(self) -> tls_door.TlsDoors:
        return self.met.world.node._http._uvicorn._doors  # type: ignore[union-attr, return-value]  # HTTP is on, with TLS

    def ended(self, reason: str) -> float:
        return self.met.world.node.server.metrics.value("spolia_http_connections_ended_total", reason=reason)

    async def is_served(self) -> bool:
        """Whether a client that connects anew is answered."""
        async with httpx2.AsyncClient(verify=self.trust, base_url=self.https.base_url, timeout=WAIT_S) as client:
            return (await client.get("/version")).status_code == 200


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("public")
    init_authority(folder, timedelta(days=1))
    for ending in ("crt", "key"):
        (folder / f"gateway.{ending}").rename(folder / f"tls.{ending}")
    return folder


@asynccontextmanager
async def guarded(model: Path, authority: Path, **changes: Any) -> AsyncIterator[Guarded]:
    """Nothing of it may raise where only the event loop hears."""
    unheard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    trust = ssl.create_default_context(cafile=str(authority / "ca.crt"))
    async with http_world(model, [FakeDecode("a", says)], public_tls_dir=authority, **changes) as met:
        base = f"https://{met.world.node.http_address}"
        async with httpx2.AsyncClient(verify=trust, base_url=base, timeout=WAIT_S) as client:
            yield Guarded(met, client, trust)
    assert not unheard


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gives way."""
    monkeypatch.setattr(connections, "GRACE_S", 600.0)


async def until(condition: Any) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110  # a count has no event
            await asyncio.sleep(0.01)


def mute(held: ExitStack, w: Guarded) -> socket.socket:
    """A connection on which nothing is said."""
    return held.enter_context(socket.create_connection(w.place, WAIT_S))


async def end_of(connection: socket.socket) -> bytes:
    """What the server said until it ended it."""
    try:
        return await asyncio.to_thread(connection.recv, 4096)
    except ConnectionResetError:
        return b""


async def test_connections_count_before_their_handshake(
    model: Path, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "GRACE_S", 0.5)
    monkeypatch.setattr(tls_door, "MAX_TOLD", 0)
    async with guarded(model, authority, max_connections=3) as w:
        with ExitStack() as held, captured_logs():
            crowd = [mute(held, w) for _ in range(12)]
            await until(lambda: w.ended("too_many") == 9)
            assert w.num_connections == 3
            for each in crowd[3:]:
                assert await end_of(each) == b""
            await asyncio.sleep(0.5)  # the grace of the three
            assert await w.is_served(), "one that says nothing gives way"
            assert w.ended("gave_way") == 1
            assert await end_of(crowd[0]) == b""
        await until(lambda: w.num_connections == 0)


async def test_a_client_too_many_is_told_so_and_when_to_come_back(model: Path, authority: Path, patience: None) -> None:
    async with guarded(model, authority, max_connections=1) as w:
        with ExitStack() as held, captured_logs():
            mute(held, w)
            await until(lambda: w.num_connections == 1)
            answer = await w.https.get("/version")
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["error"]["code"] == "too_many"
            assert (w.ended("too_many"), w.num_connections) == (1, 1)
        await until(lambda: w.num_connections == 0)
        assert await w.is_served()


async def test_few_are_told_at_a_time_and_the_others_cost_no_handshake(
    model: Path, authority: Path, monkeypatch: pytest.MonkeyPatch, patience: None
) -> None:
    monkeypatch.setattr(tls_door, "MAX_TOLD", 2)
    monkeypatch.setattr(tls_door, "TELLING_S", 2.0)
    async with guarded(model, authority, max_connections=1) as w:
        with ExitStack() as held, captured_logs():
            mute(held, w)
            await until(lambda: w.num_connections == 1)
            crowd = [mute(held, w) for _ in range(6)]
            await until(lambda: w.ended("too_many") == 4)
            for each in crowd[2:]:
                assert await end_of(each) == b""
            for each in crowd[:2]:
                assert await end_of(each) == b"", "these said nothing"
            await until(lambda: w.ended("no_handshake") == 2)
            assert (await w.https.get("/version")).status_code == 503, "their time is over"
            assert w.num_connections == 1


async def test_who_is_being_told_is_served_if_a_place_is_free_by_then(
    model: Path, authority: Path, monkeypatch: pytest.MonkeyPatch, patience: None
) -> None:
    monkeypatch.setattr(tls_door, "TELLING_S", WAIT_S)
    async with guarded(model, authority, max_connections=1) as w:
        with ExitStack() as held, captured_logs():
            first = mute(held, w)
            await until(lambda: w.num_connections == 1)
            late = mute(held, w)
            await until(lambda: len(w.doors.told) == 1)
            first.close()
            await until(lambda: w.num_connections == 0)

            def ask() -> bytes:
                with w.trust.wrap_socket(late, server_hostname=w.place[0]) as tls:
                    tls.sendall(ASK)
                    return tls.recv(4096)

            assert b" 200 " in await asyncio.to_thread(ask)
            assert w.ended("too_many") == 0


async def test_a_handshake_has_a_deadline_and_others_are_served_meanwhile(
    model: Path, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_door, "HANDSHAKE_TIMEOUT_S", 1.0)
    async with guarded(model, authority) as w:
        with ExitStack() as held, captured_logs() as logs:
            began = time.monotonic()
            silent, half = mute(held, w), mute(held, w)
            half.sendall(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a ClientHello
            await until(lambda: w.num_connections == 2)
            assert (await w.https.get("/version")).status_code == 200
            for each in (silent, half):
                assert await end_of(each) == b""
            assert 0.9 < time.monotonic() - began < 9.0, "not the 10 s that it is elsewhere"
            assert w.ended("no_handshake") == 2
            await until(lambda: w.num_connections == 1)
            assert (await w.https.get("/version")).status_code == 200, "on the connection of the first time"
            assert w.num_connections == 1
        assert [entry["peer"] for entry in logs if entry.get("reason") == "no_handshake"][:1] == ["127.0.0.1"]


async def test_what_is_no_tls_is_ended_and_counted(model: Path, authority: Path) -> None:
    async with guarded(model, authority) as w:
        with ExitStack() as held, captured_logs():
            plain = mute(held, w)
            plain.sendall(ASK)
            assert b"HTTP" not in await end_of(plain)
            await until(lambda: w.ended("bad_handshake") == 1)
            gone = mute(held, w)
            await until(lambda: w.num_connections == 1)
            gone.close()
            await until(lambda: w.num_connections == 0)
        endings = {ending.value: w.ended(ending.value) for ending in connections.Ending}
        assert {reason: count for reason, count in endings.items() if count} == {"bad_handshake": 1}


async def test_a_request_in_the_packet_that_ends_the_handshake_is_answered(model: Path, authority: Path) -> None:
    async with guarded(model, authority) as w:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = w.trust.wrap_bio(incoming, outgoing, server_hostname=w.place[0])
        with ExitStack() as held:
            raw = mute(held, w)
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    raw.sendall(outgoing.read())
                    incoming.write(await asyncio.to_thread(raw.recv, 1 << 16))
            tls.write(ASK)
            raw.sendall(outgoing.read())  # the end of the handshake, and the request
            answer = b""
            while b" 200 " not in answer:
                incoming.write(await asyncio.to_thread(raw.recv, 1 << 16))
                try:
                    answer += tls.read(1 << 16)
                except ssl.SSLWantReadError:
                    continue
            assert w.num_connections == 1


async def test_a_server_that_ends_does_not_wait_for_handshakes(model: Path, authority: Path) -> None:
    with ExitStack() as held:
        async with guarded(model, authority) as w:
            waiting = [mute(held, w) for _ in range(3)]
            await until(lambda: w.num_connections == 3)
            began = time.monotonic()
        assert time.monotonic() - began < tls_door.HANDSHAKE_TIMEOUT_S / 2, "and the world saw that no task is left"
        for each in waiting:
            assert await end_of(each) == b""
