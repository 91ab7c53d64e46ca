"""`advertise_host=auto` is the address from which the directory is reached, or a refusal that says what was tried."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from captured_logs import captured_logs

from spolia_core.errors import InvalidRequest
from spolia_node import own_address
from spolia_node.config import NodeConfig, load_config

TWO_NETWORKS = """
set -e
ip link set lo up
for number in 1 2; do
    ip link add net$number type veth peer name far$number
    ip address add 10.9.$number.5/24 dev net$number
    ip link set net$number up
    ip link set far$number up
done
"""


def advertised(directory: str) -> str:
    return NodeConfig(
        host="0.0.0.0", cluster_secret="s", allow_plaintext=True, advertise_host="auto", directory=directory
    ).advertise_host


def test_a_directory_on_this_machine_is_reached_from_loopback():
    assert advertised("127.0.0.1:7300") == "127.0.0.1"
    assert advertised("localhost:7300") in ("127.0.0.1", "::1")


def test_a_directory_without_an_address_gives_the_next_one_its_turn():
    assert advertised("store.invalid:7300, 127.0.0.1:7300") == "127.0.0.1"


@pytest.fixture
def unknown_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the resolver was asked for, three times in vain."""
    asked: list[str] = []
    resolve = socket.getaddrinfo

    def resolve_later(host: str, *args: Any, **options: Any) -> Any:
        asked.append(host)
        if len(asked) <= 3:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return resolve("127.0.0.1", *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_later)
    monkeypatch.setattr(own_address, "NAME_PAUSE_S", 0.05)
    return asked


def test_a_name_that_is_not_known_yet_is_waited_for_and_that_is_said_once(unknown_names: list[str]):
    with captured_logs() as lines:
        assert advertised("store:7300") == "127.0.0.1"
    assert unknown_names == ["store"] * 4
    assert [line["event"] for line in lines] == ["waiting for the directory's name"]
    assert lines[0]["problems"] == "store:7300: Temporary failure in name resolution"


def test_the_wait_for_a_name_has_an_end(unknown_names: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(own_address, "NAME_WAIT_S", 0.06)
    with pytest.raises(InvalidRequest, match="no way to the directory: store:7300: Temporary"):
        advertised("store:7300")
    assert unknown_names == ["store"] * 2


def test_of_several_networks_it_is_the_one_that_the_directory_is_in(tmp_path: Path):
    """In namespaces of its own, with two networks, as a gateway's container has."""
    isolated = ["unshare", "--user", "--map-root-user", "--net", "--mount", "bash", "-c"]
    try:
        may = subprocess.run([*isolated, TWO_NETWORKS], capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError as error:
        pytest.skip(f"needs {error.filename}")
    if may.returncode:
        pytest.skip(f"network namespaces are not permitted here: {may.stderr.strip()}")
    program = tmp_path / "program.py"
    program.write_text(
        "from spolia_node.own_address import address_towards\n"
        "print(*(address_towards([f'10.9.{number}.1:7300']) for number in (2, 1)))\n"
    )
    script = f"{TWO_NETWORKS}\n{sys.executable} {program}"
    done = subprocess.run([*isolated, script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["10.9.2.5", "10.9.1.5"]


@pytest.mark.parametrize(
    ("directory", "said"),
    [
        ("", "advertise_host auto needs directory"),
        ("store.invalid:7300", "advertise_host auto found no way to the directory: store.invalid:7300: "),
        ("a.invalid:1,b.invalid:2", "b.invalid:2: "),
    ],
)
def test_without_a_way_to_the_directory_the_start_is_refused(
    directory: str, said: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(own_address, "NAME_WAIT_S", 0.0)
    with pytest.raises(InvalidRequest) as refused:
        advertised(directory)
    assert said in refused.value.message
    assert refused.value.field == "advertise_host"


def test_a_process_that_finds_no_way_ends_and_names_the_setting(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        load_config(NodeConfig, [], {"SPOLIA_ADVERTISE_HOST": "auto"})
    assert stopped.value.code == 2
    assert "advertise_host auto needs directory" in capsys.readouterr().err
