"""Laws of the `spolia` command as a process: what it loads, the programs it starts, and clusters that come up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cli_runs import Spolia
from fake_gateway import PATIENCE_S

from spolia.cli.drain_limit import drain_limit_s
from spolia.cli.up import _announce
from spolia.local_cluster import LocalCluster
from spolia.version import __version__


def run_process(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=60, check=False, **options)


def test_the_version_is_said_where_others_say_it(spolia: Spolia) -> None:
    done = spolia("--version")
    assert (done.code, done.out) == (0, f"spolia {__version__}\n")


def test_version_in_a_fresh_process_loads_no_engine() -> None:
    code = (
        "import sys\nfrom spolia.cli.main import main\n"
        "try:\n    main(['version', '--json'])\n"
        "finally:\n    print(*sys.modules, file=sys.stderr)"
    )
    done = run_process("-c", code)
    assert json.loads(done.stdout)["spolia"] == __version__
    assert "rich" in done.stderr.split()
    assert not {"torch", "transformers", "tokenizers", "numpy"} & set(done.stderr.split())


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_extra_the_command_says_how_to_get_it(missing: str) -> None:
    done = run_process("-c", f"import sys\nsys.modules[{missing!r}] = None\nfrom spolia.cli.main import main\nmain([])")
    assert done.returncode == 1
    assert done.stderr == f"the spolia command needs {missing}; install the extra `cli`: pip install 'spolia[cli]'\n"


@pytest.fixture
def with_plugins(tmp_path: Path) -> dict[str, str]:
    """An environment with one more service, one more benchmark, and one service whose needs are not met."""
    info = tmp_path / "site" / "plugins-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugins\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[spolia.services]\ntoaster = toaster:main\nlacking = lacking:main\n[spolia.benches]\ntoast = toaster:main\n"
    )
    (tmp_path / "site" / "toaster.py").write_text("def main(argv):\n    print(argv)\n    return len(argv)\n")
    (tmp_path / "site" / "lacking.py").write_text("import no_such_engine\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path / "site")}


@pytest.mark.parametrize("argv", [["serve", "toaster"], ["bench", "toast"]], ids=" ".join)
def test_a_program_gets_all_its_arguments_and_gives_its_exit_code(
    argv: list[str], with_plugins: dict[str, str]
) -> None:
    done = run_process("-m", "spolia.cli.main", *argv, "--help", "--port", "0", "-v", "--json", env=with_plugins)
    assert done.stdout == "['--help', '--port', '0', '-v', '--json']\n"
    assert done.returncode == 5


def test_a_service_whose_needs_are_not_met_says_so(with_plugins: dict[str, str]) -> None:
    done = run_process("-m", "spolia.cli.main", "serve", "lacking", env=with_plugins)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: service lacking needs no_such_engine, which is not installed; try: pip install"
    )


@contextmanager
def start_up(env: dict[str, str], *argv: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "spolia.cli.main", "up", "--model", "a-model", "--port", "0", *argv],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as up:
        try:
            yield up
        finally:
            up.kill()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_up_serves_until_it_is_told_to_end(
    ending: signal.Signals, stand_in_env: dict[str, str], tmp_path: Path
) -> None:
    with start_up(stand_in_env, "--json", "--decode", "2", "--log-dir", str(tmp_path / "logs")) as up:
        assert up.stdout is not None
        ready = json.loads(up.stdout.readline())
        assert sorted(node["name"] for node in ready["nodes"]) == [
            "decode-0",
            "decode-1",
            "gateway-0",
            "kvstore-0",
            "prefill-0",
        ]
        assert ready["address"] in {node["address"] for node in ready["nodes"]}
        up.send_signal(ending)
        out, err = up.communicate(timeout=PATIENCE_S)
    assert (up.returncode, out) == (0, ""), err
    assert (tmp_path / "shared" / "ended").read_text().split() == ["gateway", "decode", "decode", "prefill", "kvstore"]


def test_up_says_what_it_waits_for_and_a_second_signal_ends_it_now(stand_in_env: dict[str, str]) -> None:
    with start_up(stand_in_env, "--json", "--", "--gateway.ignore-term") as up:
        assert up.stdout is not None
        assert up.stderr is not None
        pids = [node["pid"] for node in json.loads(up.stdout.readline())["nodes"]]
        up.send_signal(signal.SIGINT)
        assert _line_with(up.stderr, "waiting") == "waiting for answers under way, at most 10 s; again to end now\n"
        up.send_signal(signal.SIGINT)
        began_s = time.monotonic()
        _, err = up.communicate(timeout=PATIENCE_S)
        assert time.monotonic() - began_s < 9.0
    assert (up.returncode, err) == (130, "")
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    ("settings", "limit_s"),
    [
        ([], 10.0),
        (["--drain-timeout-s", "3"], 3.0),
        (["--drain-timeout-s=3", "--decode.drain-timeout-s", "70", "--log-level", "debug"], 70.0),
        (["--drain-timeout-s", "soon"], 10.0),
    ],
)
def test_up_gives_nodes_the_time_they_were_given(
    settings: list[str], limit_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPOLIA_DRAIN_TIMEOUT_S", raising=False)
    assert drain_limit_s(settings) == limit_s
    monkeypatch.setenv("SPOLIA_DRAIN_TIMEOUT_S", "30")
    assert drain_limit_s(["--kvstore.drain-timeout-s", "5"]) == 30.0


def test_up_gives_nodes_the_time_that_their_file_gives_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPOLIA_DRAIN_TIMEOUT_S", raising=False)
    file = tmp_path / "cluster.toml"
    file.write_text("drain_timeout_s = 20\n[decode]\ndrain_timeout_s = 90.5\n", encoding="utf-8")
    other = tmp_path / "gateway.toml"
    other.write_text('drain_timeout_s = "120"\n', encoding="utf-8")
    assert drain_limit_s(["--config", str(file)]) == 90.5
    assert drain_limit_s(["--config", str(file), "--decode.drain-timeout-s", "5"]) == 20.0
    assert drain_limit_s([f"--gateway.config={other}"]) == 120.0
    assert drain_limit_s(["--config", str(tmp_path / "nothing.toml")]) == 10.0
    monkeypatch.setenv("SPOLIA_CONFIG", str(file))
    assert drain_limit_s([]) == 90.5
    monkeypatch.setenv("SPOLIA_DRAIN_TIMEOUT_S", "30")
    assert drain_limit_s([]) == 30.0


def test_up_goes_on_without_a_prefill_node_and_ends_without_decode(stand_in_env: dict[str, str]) -> None:
    with start_up(stand_in_env, "--json") as up:
        assert up.stdout is not None
        assert up.stderr is not None
        pids = {node["role"]: node["pid"] for node in json.loads(up.stdout.readline())["nodes"]}
        os.kill(pids["prefill"], signal.SIGKILL)
        assert "prefill-0" in (line := _line_with(up.stderr, "was ended by signal 9"))
        assert "the cluster goes on" in line
        os.kill(pids["decode"], signal.SIGKILL)
        _, err = up.communicate(timeout=PATIENCE_S)
    assert up.returncode == 1
    assert "error: decode-0" in err


def _line_with(lines: Any, text: str) -> str:
    return next(str(line) for line in lines if text in line)


def test_up_tells_why_a_node_did_not_start(stand_in_env: dict[str, str]) -> None:
    with start_up(stand_in_env, "--", "--decode.die-with", "3") as up:
        out, err = up.communicate(timeout=PATIENCE_S)
    assert (up.returncode, out) == (1, "")
    assert "error: decode-0 ended with exit code 3 before it was ready" in err
    assert "decode cannot go on" in err
    assert "Traceback" not in err


def test_up_passes_on_that_a_node_refused_what_it_was_told(stand_in_env: dict[str, str]) -> None:
    with start_up(stand_in_env, "--", "--decode.die-with", "2") as up:
        out, err = up.communicate(timeout=PATIENCE_S)
    assert (up.returncode, out) == (2, "")
    assert "error: decode-0 ended with exit code 2 before it was ready" in err
    assert "Traceback" not in err


def test_up_passes_on_that_a_node_does_not_know_a_setting(stand_in_env: dict[str, str]) -> None:
    with start_up(stand_in_env, "--", "--kvstore.no-such-setting", "2") as up:
        _, err = up.communicate(timeout=PATIENCE_S)
    assert up.returncode == 2
    assert "no-such-setting" in err


@pytest.mark.parametrize("log_dir", ["/proc/nope", "/dev/null", "/dev/null/logs"])
def test_up_says_in_a_line_that_logs_cannot_be_kept(log_dir: str, stand_in_env: dict[str, str]) -> None:
    with start_up(stand_in_env, "--log-dir", log_dir) as up:
        out, err = up.communicate(timeout=PATIENCE_S)
    assert (up.returncode, out) == (2, "")
    (line,) = [line for line in err.splitlines() if "starting the cluster" not in line]
    assert line.startswith(f"error: cannot keep logs in {log_dir}: ")


@pytest.mark.parametrize("setting", ["--deocde.pool-bytes", "--deocde.pool-bytes=5"])
def test_up_names_the_roles_when_a_setting_is_for_none_of_them(
    setting: str, spolia: Spolia, stand_in_env: dict[str, str]
) -> None:
    done = spolia("up", "--", setting, "5")
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert 'there is no role "deocde"' in line
    assert all(role in line for role in ("kvstore", "prefill", "decode", "gateway"))


def test_up_names_what_a_client_needs_behind_keys_and_tls(
    stand_in_env: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with LocalCluster(env=stand_in_env, log_dir=tmp_path / "logs") as cluster:
        _announce(cluster, as_json=False)
        shown = capsys.readouterr().out
        assert "export" not in shown
        assert "SSL_CERT_FILE" not in shown
        cluster._keys, cluster._tls_dir = "keys.json", tmp_path / "certs"
        _announce(cluster, as_json=False)
    shown = capsys.readouterr().out
    assert "  export SPOLIA_API_KEY=sk-spolia-…" in shown
    assert f"  export SPOLIA_CA_FILE={tmp_path}/certs/ca.crt\n  spolia generate --address" in shown
    assert f"/v1\n  with SSL_CERT_FILE={tmp_path}/certs/ca.crt\n" in shown, "OpenAI's clients read no variable of ours"


def test_up_without_a_model_starts_nothing(
    spolia: Spolia, stand_in_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SPOLIA_MODEL", "SPOLIA_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    done = spolia("up", "--log-dir", str(tmp_path / "logs"), "--", "--kvstore.log-level", "debug")
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: name the model to serve: spolia up --model DIR (field: model)\n"
    assert not (tmp_path / "logs").exists()


def test_up_shows_nodes_and_what_to_do_next(stand_in_env: dict[str, str]) -> None:
    with start_up({**stand_in_env, "COLUMNS": "200"}) as up:
        assert up.stdout is not None
        shown = ""
        for line in up.stdout:
            shown += line
            if "Ctrl-C ends the cluster." in line:
                break
        up.terminate()
        up.communicate(timeout=PATIENCE_S)
    assert all(
        name in shown for name in ("gateway-0", "decode-0", "prefill-0", "kvstore-0", "spolia generate --address")
    )
