"""A port that speaks another protocol than its caller: an error that says what to set, and no outage."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import fake_gateway
import fake_store
import grpc
import pytest
from fake_gateway import FakeGateway
from fake_store import FakeStore

from spolia import AsyncClient, ChatMessage, Client, InvalidRequest, Unavailable, spoken
from spolia.cli.app import run
from spolia.local_authority import init_authority
from spolia.spoken import Spoken, spoken_at
from spolia.store_admin import StoreAdmin

METHODS = [
    ("generate", ("Hi",)),
    ("chat", ([ChatMessage("user", "Hi")],)),
    ("warm", (["a text"],)),
    ("tokenize", ("Hi",)),
    ("cluster", ()),
]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SPOLIA_CA_FILE", "SPOLIA_TLS_DIR", "SPOLIA_ALLOW_PLAINTEXT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(spoken, "PROBE_TIMEOUT_S", 30.0)  # whoever answers does so in time


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spoken") / "certs"
    init_authority(folder, timedelta(days=1))
    return folder


@pytest.fixture(scope="module")
def under_tls(certs: Path) -> Iterator[str]:
    pair = ((certs / "gateway.key").read_bytes(), (certs / "gateway.crt").read_bytes())
    gateway = FakeGateway()
    server = fake_gateway.start(gateway, credentials=grpc.ssl_server_credentials([pair]))
    yield gateway.address
    server.stop(grace=None).wait(fake_gateway.PATIENCE_S)


@pytest.fixture(scope="module")
def in_plaintext() -> Iterator[str]:
    gateway = FakeGateway()
    server = fake_gateway.start(gateway)
    yield gateway.address
    server.stop(grace=None).wait(fake_gateway.PATIENCE_S)


def outcome(*argv: str) -> int:
    try:
        return run(argv)
    except SystemExit as ended:
        return int(ended.code or 0)


@contextmanager
def listening(says: bytes) -> Iterator[str]:
    """A port that says the same to everybody, and closes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                with peer:
                    peer.recv(1 << 12)
                    peer.sendall(says)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@pytest.fixture(params=["blocking", "asyncio"])
def ask(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`ask(client options, "generate", …)` on a fresh client of either kind."""

    def blocking(options: dict[str, Any], method: str, *args: Any) -> Any:
        with Client(**options) as client:
            return getattr(client, method)(*args)

    def on_a_loop(options: dict[str, Any], method: str, *args: Any) -> Any:
        async def run() -> Any:
            async with AsyncClient(**options) as client:
                return await getattr(client, method)(*args)

        return asyncio.run(run())

    return blocking if request.param == "blocking" else on_a_loop


@pytest.mark.parametrize(("method", "arguments"), METHODS)
def test_a_gateway_under_tls_that_is_called_in_plaintext_says_what_to_set(
    under_tls: str, ask: Callable[..., Any], method: str, arguments: tuple[Any, ...]
) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidRequest, match="speaks TLS, and was called in plaintext") as caught:
        ask({"address": under_tls, "retry_s": 60}, method, *arguments)
    assert time.monotonic() - began < 20, "it is not waited for"
    assert (caught.value.field, caught.value.limit, caught.value.actual) == ("ca_file", "TLS", "plaintext")
    assert "SPOLIA_CA_FILE" in caught.value.message


@pytest.mark.parametrize(("method", "arguments"), METHODS)
def test_a_gateway_in_plaintext_that_is_called_under_tls_says_what_to_set(
    in_plaintext: str, certs: Path, ask: Callable[..., Any], method: str, arguments: tuple[Any, ...]
) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidRequest, match="speaks plaintext, and was called in TLS") as caught:
        ask({"address": in_plaintext, "ca_file": certs / "ca.crt", "retry_s": 60}, method, *arguments)
    assert time.monotonic() - began < 20, "it is not waited for"
    assert (caught.value.field, caught.value.limit, caught.value.actual) == ("ca_file", "plaintext", "TLS")
    assert "SPOLIA_ALLOW_PLAINTEXT" in caught.value.message


def test_what_the_errors_name_is_what_helps(under_tls: str, certs: Path, in_plaintext: str) -> None:
    with Client(under_tls, ca_file=certs / "ca.crt") as client:
        assert client.generate("Hi").text == "Héllo"
    with Client(in_plaintext) as client:
        assert client.generate("Hi").text == "Héllo"


def test_the_port_of_http_is_told_from_an_outage(ask: Callable[..., Any]) -> None:
    told = pytest.raises(InvalidRequest, match=r"speaks HTTP/1\.1, .* 7300")
    with listening(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address, told as caught:
        ask({"address": address}, "models")
    assert caught.value.field == "address"


@pytest.mark.parametrize("says", [b"", b"\x15", b"220 mail.example ESMTP\r\n"])
def test_a_port_that_says_nothing_known_stays_an_outage(ask: Callable[..., Any], says: bytes) -> None:
    with listening(says) as address, pytest.raises(Unavailable):
        ask({"address": address, "retry_s": 0}, "models")


def test_nobody_there_and_nobody_answering_are_found_within_the_time(ask: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        assert spoken_at(address, Spoken.PLAINTEXT, 0.1) is None
        assert time.monotonic() - began < 15
    began = time.monotonic()
    with pytest.raises(Unavailable):
        ask({"address": address, "retry_s": 0, "timeout_s": 0.5}, "models")
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("command", [("generate", "Hi"), ("cluster", "--once"), ("doctor",), ("warm", __file__)])
def test_commands_say_it_too(
    under_tls: str,
    in_plaintext: str,
    certs: Path,
    command: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert outcome(*command, "--address", under_tls) == 2
    assert "speaks TLS" in capsys.readouterr().err
    monkeypatch.setenv("SPOLIA_TLS_DIR", str(certs))
    assert outcome(*command, "--address", in_plaintext) == 2
    assert "speaks plaintext" in capsys.readouterr().err


def test_a_store_that_speaks_otherwise_says_so(certs: Path, under_tls: str) -> None:
    store = FakeStore()
    server = fake_store.start(store)
    try:
        told = pytest.raises(InvalidRequest, match="speaks plaintext, and was called in TLS")
        with StoreAdmin([store.address], tls_dir=certs) as stores, told as caught:
            stores.stats()
        assert caught.value.field == "tls_dir"
        assert store.address in caught.value.message
        with StoreAdmin([under_tls]) as stores, pytest.raises(InvalidRequest, match="speaks TLS"):
            stores.stats()
    finally:
        server.stop(grace=None).wait(fake_gateway.PATIENCE_S)
