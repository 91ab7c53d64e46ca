"""Laws of a cluster on this machine, with stand-ins for the services."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_gateway import FakeGateway

from spolia.client import Client
from spolia.errors import Forbidden, InvalidRequest, SpoliaError, Unauthenticated, Unavailable
from spolia.local_cluster import LocalCluster, _known_addresses, settings_for
from spolia.local_node import LocalNode, NodeExit, NodeFailed, NodeProcess, NodeRefused

PATIENCE_S = 30.0

MakeCluster = Callable[..., LocalCluster]


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    return tmp_path / "shared"


@pytest.fixture
def make_cluster(tmp_path: Path, stand_in_env: dict[str, str], request: pytest.FixtureRequest) -> MakeCluster:
    def make(**options: Any) -> LocalCluster:
        defaults = {"env": stand_in_env, "log_dir": tmp_path / "logs", "start_timeout_s": PATIENCE_S}
        cluster = LocalCluster(**{**defaults, **options})
        request.addfinalizer(cluster.stop)
        return cluster

    return make


@pytest.mark.parametrize("kind", [Unauthenticated, Forbidden])
def test_a_cluster_that_may_not_ask_its_gateway_says_whose_key_it_needs(
    kind: type[SpoliaError], gateway: FakeGateway
) -> None:
    gateway.failure = kind("a key is needed", field="authorization")
    with Client(gateway.address, retry_s=0) as client, pytest.raises(kind) as caught:
        _known_addresses(client)
    assert "spolia keys create --operator" in caught.value.message
    assert "a key is needed" in caught.value.message
    assert caught.value.field == "authorization"


def is_there(node: LocalNode) -> bool:
    try:
        os.kill(node.pid, 0)
    except ProcessLookupError:
        return False
    return True


def roles_of(cluster: LocalCluster) -> list[str]:
    return sorted(node.role for node in cluster.nodes)


def test_the_gateway_says_where_it_serves_http(make_cluster: MakeCluster) -> None:
    with make_cluster(http_port=8123) as cluster:
        assert cluster.http_address == "127.0.0.1:8123"
        assert cluster.url == "http://127.0.0.1:8123"
        assert [node.http_address for node in cluster.nodes if node.role != "gateway"] == ["", "", ""]
        assert {node.metrics_address for node in cluster.nodes} == {"127.0.0.1:9"}
    with make_cluster(http_port=-1) as silent:
        assert silent.http_address == silent.url == ""


def test_a_started_cluster_is_known_to_its_gateway(make_cluster: MakeCluster) -> None:
    with make_cluster(num_decode=2) as cluster:
        assert roles_of(cluster) == ["decode", "decode", "gateway", "kvstore", "prefill"]
        assert [node.name for node in cluster.nodes if node.role == "decode"] == ["decode-0", "decode-1"]
        with Client(cluster.address) as client:
            assert {node.address for node in client.cluster().nodes} == {node.address for node in cluster.nodes}


def test_nodes_stop_front_door_first_and_store_last(make_cluster: MakeCluster, shared: Path) -> None:
    cluster = make_cluster()
    cluster.start()
    nodes = cluster.nodes
    assert cluster.stop() == ()
    assert (shared / "ended").read_text().split() == ["gateway", "decode", "prefill", "kvstore"]
    assert cluster.nodes == ()
    assert not any(is_there(node) for node in nodes)
    assert cluster.stop() == ()


def test_every_node_is_told_its_port_directory_model_and_settings(
    make_cluster: MakeCluster, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with make_cluster(model="some/model", settings=["--decode.log-level", "debug"], engine_threads=3) as cluster:
        told = {node.role: (shared / node.address).read_text() for node in cluster.nodes}
        directory = f"--directory {cluster.directory_address} --model some/model"
        assert told == {
            "kvstore": "kvstore threads= --port 0",
            "prefill": f"prefill threads=3 --port 0 {directory}",
            "decode": f"decode threads=3 --port 0 {directory} --log-level debug",
            "gateway": f"gateway threads= --http-port 0 --port 0 {directory}",
        }


def test_engines_are_told_where_profiles_are_and_others_are_not(
    make_cluster: MakeCluster, shared: Path, tmp_path: Path
) -> None:
    with make_cluster(model="some/model", profile_dir=tmp_path) as cluster:
        told = {node.role: (shared / node.address).read_text() for node in cluster.nodes}
        knowing = {role for role, text in told.items() if f"--profile-dir {tmp_path}" in text}
        assert knowing == {"prefill", "decode"}


def test_the_users_number_of_threads_wins(
    make_cluster: MakeCluster, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with make_cluster() as cluster:
        assert all("threads=7 " in (shared / node.address).read_text() for node in cluster.nodes)


def test_a_node_that_ends_before_it_is_ready_fails_the_start_at_once_with_its_log(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(settings=["--decode.die-with", "3", "--prefill.mute"], start_timeout_s=600.0)
    with pytest.raises(NodeFailed, match=r"decode-0 ended with exit code 3 before it was ready[^\0]*cannot go on"):
        cluster.start()
    assert cluster.nodes == ()


def test_a_node_that_refuses_what_it_was_told_makes_the_request_invalid(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(settings=["--prefill.die-with", "2"])
    with pytest.raises(NodeRefused, match="prefill-0 ended with exit code 2 before it was ready") as refused:
        cluster.start()
    assert isinstance(refused.value, NodeFailed)
    assert isinstance(refused.value, InvalidRequest)
    assert cluster.nodes == ()


def test_logs_that_cannot_be_kept_are_refused_by_name(make_cluster: MakeCluster, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cluster = make_cluster(log_dir=tmp_path / "file" / "logs")
    with pytest.raises(InvalidRequest, match="cannot keep logs") as refused:
        cluster.start()
    assert refused.value.field == "log_dir"
    assert cluster.nodes == ()


def test_nodes_are_given_no_key_of_a_client(make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOLIA_API_KEY", "sk-spolia-mine")
    monkeypatch.setenv("SPOLIA_ADDRESS", "127.0.0.1:1")
    with make_cluster() as cluster:
        for node in cluster.nodes:
            environment = Path(f"/proc/{node.pid}/environ").read_bytes()
            assert b"SPOLIA_ADDRESS=127.0.0.1:1" in environment
            assert b"sk-spolia-mine" not in environment


def test_a_setting_for_a_role_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(InvalidRequest, match='no role "deocde"') as refused:
        LocalCluster(settings=["--log-level", "debug", "--deocde.pool-bytes", "5"])
    assert (refused.value.field, refused.value.limit) == ("settings", "kvstore, prefill, decode, gateway")


def test_a_node_that_is_never_ready_fails_the_start_in_time(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(settings=["--kvstore.mute"], start_timeout_s=1.0)
    with pytest.raises(NodeFailed, match="kvstore-0 was not ready within 1 s"):
        cluster.start()
    assert cluster.nodes == ()


def test_a_node_the_gateway_never_hears_of_fails_the_start_in_time(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(settings=["--prefill.hide"], start_timeout_s=10.0)
    with pytest.raises(NodeFailed, match="does not know prefill-0"):
        cluster.start()
    assert cluster.nodes == ()


def test_a_node_that_ignores_the_signal_is_killed_and_named(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(settings=["--prefill.ignore-term"], stop_timeout_s=3.0)
    cluster.start()
    (late,) = cluster.stop()
    assert late.name == "prefill-0"
    assert not is_there(late)


def test_a_crash_is_reported_once_and_the_others_go_on(make_cluster: MakeCluster, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "decode-0.log").write_text("an earlier decode-0 ended well\n")
    exits: list[NodeExit] = []
    reported = threading.Event()

    def note(ended: NodeExit) -> None:
        exits.append(ended)
        reported.set()

    with make_cluster(on_exit=note) as cluster:
        victim = next(node for node in cluster.nodes if node.role == "decode")
        os.kill(victim.pid, signal.SIGKILL)
        assert reported.wait(PATIENCE_S)
        assert roles_of(cluster) == ["gateway", "kvstore", "prefill"]
    (ended,) = exits
    assert (ended.node, ended.exit_code) == (victim, -signal.SIGKILL)
    assert ended.log_tail.startswith("decode starts with"), "what an earlier process logged is left out"


def test_a_crash_is_reported_though_the_logs_are_gone(make_cluster: MakeCluster, tmp_path: Path) -> None:
    exits: queue.SimpleQueue[NodeExit] = queue.SimpleQueue()
    with make_cluster(on_exit=exits.put) as cluster:
        shutil.rmtree(tmp_path / "logs")
        victim = next(node for node in cluster.nodes if node.role == "decode")
        os.kill(victim.pid, signal.SIGKILL)
        ended = exits.get(timeout=PATIENCE_S)
    assert (ended.node, ended.log_tail) == (victim, "")


def test_a_node_is_heard_though_its_output_cannot_be_logged(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    heard = threading.Condition()
    node = NodeProcess(
        "decode-0",
        "decode",
        [sys.executable, "-c", "import sys; sys.stdin.read(1); print('x' * 200_000); print('READY decode h:1')"],
        env={},
        log_path=tmp_path / "log",
        changed=heard,
        on_exit=lambda _: None,
    )
    (tmp_path / "log").unlink()
    (tmp_path / "log").mkdir()
    assert node._process.stdin is not None
    node._process.stdin.write("go")
    node._process.stdin.flush()
    assert node.wait_ended(time.monotonic() + PATIENCE_S)
    with heard:
        assert heard.wait_for(lambda: node.ready, PATIENCE_S)


def test_a_node_killed_on_purpose_is_gone_at_once_and_not_reported(make_cluster: MakeCluster) -> None:
    exits: list[NodeExit] = []
    with make_cluster(on_exit=exits.append) as cluster:
        victim = next(node for node in cluster.nodes if node.role == "prefill")
        cluster.kill(victim)
        assert not is_there(victim)
        assert "prefill" not in roles_of(cluster)
    assert exits == []


def test_a_killed_node_restarts_under_its_name_and_at_its_address(make_cluster: MakeCluster) -> None:
    with make_cluster() as cluster:
        victim = next(node for node in cluster.nodes if node.role == "kvstore")
        cluster.kill(victim)
        again = cluster.restart(victim)
        assert (again.name, again.address) == (victim.name, victim.address)
        assert again.pid != victim.pid
        assert again in cluster.nodes
        with pytest.raises(ValueError, match="is running"):
            cluster.restart(again)


def test_a_node_can_join_later(make_cluster: MakeCluster) -> None:
    with make_cluster(num_prefill=0) as cluster:
        joined = cluster.add_node("prefill")
        assert joined in cluster.nodes
        with Client(cluster.address) as client:
            assert joined.address in {node.address for node in client.cluster().nodes}


def test_a_cluster_that_was_not_started_has_no_address(make_cluster: MakeCluster) -> None:
    with pytest.raises(Unavailable, match="has not been started"):
        _ = make_cluster().address


def test_nodes_end_when_their_parent_is_killed(stand_in_env: dict[str, str], tmp_path: Path) -> None:
    program = """
        import sys
        from pathlib import Path
        from spolia.local_cluster import LocalCluster
        cluster = LocalCluster(log_dir=Path(sys.argv[1]))
        cluster.start()
        print(*[node.address for node in cluster.nodes if node.role != "gateway"], flush=True)
        sys.stdin.read()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "logs")],
        env={**os.environ, **stand_in_env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        addresses = parent.stdout.readline().split()
        lines = [socket.create_connection(("127.0.0.1", _port(address)), PATIENCE_S) for address in addresses]
        assert len(lines) == 3
        parent.kill()
        for line in lines:  # the system closes a process's connections when the process ends
            with line:
                assert _hung_up(line)


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def _hung_up(line: socket.socket) -> bool:
    try:
        return line.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_dot_in_a_value_names_no_role() -> None:
    settings = ["--store-share=0.5", "--store-share", "0.5", "--decode.store-share=0.25", "--model", "a.b"]
    assert settings_for("decode", settings) == [
        "--store-share=0.5",
        "--store-share",
        "0.5",
        "--store-share=0.25",
        "--model",
        "a.b",
    ]
    assert settings_for("kvstore", settings) == ["--store-share=0.5", "--store-share", "0.5", "--model", "a.b"]


def test_settings_of_a_role_reach_that_role_only() -> None:
    settings = ["--log-level", "debug", "--decode.pool-bytes", "9", "--prefill.pool-bytes=5", "--store-share", "0.5"]
    assert settings_for("decode", settings) == ["--log-level", "debug", "--pool-bytes", "9", "--store-share", "0.5"]
    assert settings_for("prefill", settings) == ["--log-level", "debug", "--pool-bytes=5", "--store-share", "0.5"]
    assert settings_for("kvstore", settings) == ["--log-level", "debug", "--store-share", "0.5"]
