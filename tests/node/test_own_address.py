"""`advertise_host=auto` is the address from which the directory is reached, or a refusal that says what was tried."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from spolia_core.errors import InvalidRequest
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
def test_without_a_way_to_the_directory_the_start_is_refused(directory: str, said: str):
    with pytest.raises(InvalidRequest) as refused:
        advertised(directory)
    assert said in refused.value.message
    assert refused.value.field == "advertise_host"


def test_a_process_that_finds_no_way_ends_and_names_the_setting(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        load_config(NodeConfig, [], {"SPOLIA_ADVERTISE_HOST": "auto"})
    assert stopped.value.code == 2
    assert "advertise_host auto needs directory" in capsys.readouterr().err
