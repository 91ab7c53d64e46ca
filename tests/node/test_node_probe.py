"""The probe says what the node's health says, as the node itself, in one line and in time."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from node_worlds import DIRECTORY_SERVICE, STORE_SERVICE, serving
from tls_worlds import DAY, authority_in, expired, serving_tls

from spolia.local_authority import LocalAuthority
from spolia.v1 import gateway_pb2_grpc
from spolia_core.node_name import NODE_ROLES
from spolia_gateway.config import GatewayConfig
from spolia_node.certificates import PublicCertificates
from spolia_node.config import NodeConfig
from spolia_node.edges import GATEWAY
from spolia_node.probe import main
from spolia_node.probe_settings import ProbeSettings, read_settings
from spolia_node.server import NodeServer
from spolia_node.settings import settings_of

LIMIT_S = 30


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return authority_in(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def free_port() -> Iterator[int]:
    """One that nobody listens on for as long as the test runs."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def only(folder: Path, role: str, into: Path, stem: str) -> Path:
    """A folder with what one node is given, under the names `stem`."""
    into.mkdir()
    for suffix in ("crt", "key"):
        shutil.copy(folder / f"{role}.{suffix}", into / f"{stem}.{suffix}")
    shutil.copy(folder / "ca.crt", into)
    return into


def port_of(server: NodeServer) -> str:
    return server.address.rpartition(":")[2]


class Probes:
    """Probes as they are run beside a node: its environment, and flags."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    async def __call__(self, environ: dict[str, str], *flags: str) -> tuple[int, str]:
        code = await asyncio.to_thread(main, flags, environ)
        out = self._capsys.readouterr().out
        assert out.count("\n") == 1, out
        return code, out.strip()


@pytest.fixture
def probe(capsys: pytest.CaptureFixture[str]) -> Probes:
    return Probes(capsys)


async def test_a_probe_follows_the_health_of_the_node_and_of_each_service(probe: Probes):
    async with serving() as world:
        environ = {"SPOLIA_PORT": port_of(world.server)}
        assert await probe(environ) == (0, f"SERVING all services at {world.server.address}")
        world.server.health.set(STORE_SERVICE, False)
        assert (await probe(environ))[0] == 1
        assert (await probe(environ, "--service", DIRECTORY_SERVICE))[0] == 0
        code, line = await probe(environ, "--service", STORE_SERVICE)
        assert (code, line) == (1, f"NOT_SERVING {STORE_SERVICE} at {world.server.address}")


async def test_an_unknown_service_is_no_success_even_of_a_node_that_is_alive(probe: Probes):
    async with serving() as world:
        code, line = await probe({"SPOLIA_PORT": port_of(world.server)}, "--service", "spolia.v1.Nothing", "--alive")
    assert code == 1
    assert line.startswith("NOT_FOUND spolia.v1.Nothing at")


async def test_a_draining_node_is_not_serving_and_alive(probe: Probes):
    async with serving() as world:
        world.server.health.drain()
        environ = {"SPOLIA_PORT": port_of(world.server)}
        assert (await probe(environ))[0] == 1
        assert (await probe(environ, "--alive"))[0] == 0


@pytest.mark.parametrize(
    ("host", "asked"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("10.0.0.7", "10.0.0.7"), ("node-a", "node-a")]
)
def test_a_node_on_every_address_is_asked_on_loopback(host: str, asked: str):
    assert read_settings([], {"SPOLIA_HOST": host, "SPOLIA_PORT": "7300"}).address == f"{asked}:7300"


async def test_nobody_listening_is_a_failure_with_a_reason(probe: Probes, free_port: int):
    code, line = await probe({"SPOLIA_PORT": str(free_port)})
    assert code == 1
    assert line.startswith(f"UNAVAILABLE all services at 127.0.0.1:{free_port}: ")


async def test_a_node_that_is_stuck_fails_the_probe_in_time(probe: Probes):
    with socket.create_server(("127.0.0.1", 0)) as stuck:  # connections are made, and nobody takes them
        begun = time.monotonic()
        code, line = await probe({"SPOLIA_PORT": str(stuck.getsockname()[1])}, "--timeout-s", "0.3")
        took_s = time.monotonic() - begun
    assert code == 1
    assert line.startswith(("DEADLINE_EXCEEDED", "UNAVAILABLE"))
    assert 0.25 < took_s < 3.0


@pytest.mark.parametrize("role", NODE_ROLES[1:])
@pytest.mark.parametrize("as_mounted", [True, False], ids=["tls.crt", "ROLE.crt"])
async def test_a_node_under_tls_is_probed_with_its_own_certificate(
    certificates: Path, tmp_path: Path, probe: Probes, role: str, as_mounted: bool
):
    own = only(certificates, role, tmp_path / "certs", "tls" if as_mounted else role)
    async with serving_tls(own, role) as server:
        environ = {"SPOLIA_PORT": port_of(server), "SPOLIA_TLS_DIR": str(own)}
        assert await probe(environ) == (0, f"SERVING all services at {server.address}")


async def test_among_certificates_of_several_roles_the_probe_must_be_told_which(certificates: Path, probe: Probes):
    async with serving_tls(certificates, "decode") as server:
        environ = {"SPOLIA_PORT": port_of(server), "SPOLIA_TLS_DIR": str(certificates)}
        code, line = await probe(environ)
        assert code == 1
        assert "gateway, prefill, decode, kvstore: say which with --role" in line
        assert (await probe(environ, "--role", "decode"))[0] == 0


async def test_a_node_of_another_role_is_not_taken_for_this_one(certificates: Path, probe: Probes):
    async with serving_tls(certificates, "decode") as server:
        environ = {"SPOLIA_PORT": port_of(server), "SPOLIA_TLS_DIR": str(certificates)}
        code, line = await probe(environ, "--role", "prefill")
    assert code == 1
    assert line.startswith("UNAVAILABLE")


async def test_a_certificate_that_ended_while_the_node_ran_fails_its_probe(tmp_path: Path, probe: Probes):
    folder = authority_in(tmp_path / "certs")
    async with serving_tls(folder) as server:
        expired(folder, "kvstore")
        environ = {"SPOLIA_PORT": port_of(server), "SPOLIA_TLS_DIR": str(folder)}
        assert (await probe(environ, "--role", "kvstore"))[0] == 1


async def test_a_gateway_is_believed_by_the_certificate_it_shows_to_users(
    certificates: Path, tmp_path: Path, probe: Probes
):
    public = tmp_path / "public"
    public.mkdir()
    LocalAuthority.create(DAY).issue(public, "tls", timedelta(days=1), ["*.example.org"])
    gateway = NodeServer(NodeConfig(tls_dir=certificates), "gateway")
    gateway.front_certificates = PublicCertificates(public)
    servicer = gateway_pb2_grpc.GatewayServiceServicer()
    gateway.add(lambda server: gateway_pb2_grpc.add_GatewayServiceServicer_to_server(servicer, server), GATEWAY)
    await gateway.start()
    try:
        environ = {"SPOLIA_PORT": port_of(gateway), "SPOLIA_TLS_DIR": str(certificates)}
        assert (await probe(environ, "--role", "gateway"))[0] == 1, "another authority than the nodes'"
        assert (await probe(environ | {"SPOLIA_PUBLIC_TLS_DIR": str(public)}))[0] == 0
    finally:
        await gateway.stop_at_once()


@pytest.mark.parametrize(
    ("environ", "flags", "said"),
    [
        ({}, [], "port must be set"),
        ({"SPOLIA_PORT": "0"}, [], "port must be between 1 and 65535, got 0 from SPOLIA_PORT"),
        ({"SPOLIA_PORT": "x"}, [], "port must be a whole number, got x from SPOLIA_PORT"),
        ({"SPOLIA_PORT": "1"}, ["--role", "king"], "role must be one of"),
        ({"SPOLIA_PORT": "1"}, ["--timeout-s", "0"], "timeout_s must be between"),
        ({"SPOLIA_PORT": "1"}, ["--wrong"], "unrecognized arguments: --wrong"),
        ({"SPOLIA_PORT": "1", "SPOLIA_TLS_DIR": "/nowhere"}, [], "/nowhere/tls.crt cannot be read"),
        ({"SPOLIA_PORT": "1", "SPOLIA_PUBLIC_TLS_DIR": "/nowhere"}, [], "/nowhere/tls.crt cannot be read"),
    ],
)
async def test_what_is_wrong_with_the_settings_is_said_with_exit_code_1(
    probe: Probes, environ: dict[str, str], flags: list[str], said: str
):
    code, line = await probe(environ, *flags)
    assert code == 1
    assert line.startswith("probe: ")
    assert said in line


@pytest.mark.parametrize("stem", ["kvstore", "tls"])
async def test_files_that_hold_no_certificate_fail_with_a_line(tmp_path: Path, probe: Probes, stem: str):
    for name in (f"{stem}.crt", f"{stem}.key", "ca.crt"):
        (tmp_path / name).write_text("nothing\n")
    async with serving() as world:
        environ = {"SPOLIA_PORT": port_of(world.server), "SPOLIA_TLS_DIR": str(tmp_path)}
        assert (await probe(environ, "--timeout-s", "0.5"))[0] == 1


def test_what_a_probe_reads_of_the_environment_are_settings_of_a_node():
    of_nodes = {item.env: item.kind for item in settings_of(GatewayConfig)}
    for item in settings_of(ProbeSettings)[:4]:
        assert of_nodes[item.env] is item.kind


async def test_as_a_process_it_writes_one_line_and_nothing_else(certificates: Path, tmp_path: Path):
    own = only(certificates, "kvstore", tmp_path / "certs", "kvstore")
    async with serving_tls(own) as server:
        environ = os.environ | {"SPOLIA_PORT": port_of(server), "SPOLIA_TLS_DIR": str(own)}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "spolia_node.probe"),
            env=environ,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(), LIMIT_S)
    assert (process.returncode, out.decode(), err) == (0, f"SERVING all services at {server.address}\n", b"")


def test_a_probe_loads_little():
    program = """
import sys
from spolia_node.probe import main
main(["--port", "1"])
print(*sorted({"torch", "numpy", "structlog", "cryptography", "spolia", "prometheus_client"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert done.stdout.splitlines()[1] == ""
