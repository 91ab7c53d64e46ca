"""Laws of the `spolia` command, against a gateway whose answers are written down beforehand."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_gateway import PATIENCE_S, FakeGateway, Hang, delta

from spolia import SpoliaError, errors
from spolia.cli.main import main
from spolia.cli.up import _announce, _drain_limit_s
from spolia.local_cluster import LocalCluster
from spolia.v1 import directory_pb2, gateway_pb2
from spolia.version import __version__


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object on standard output."""
        assert self.out.count("\n") == 1
        return json.loads(self.out)


Spolia = Callable[..., Done]


@pytest.fixture
def spolia(gateway: FakeGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Spolia:
    """Runs a command in this process, with the fake gateway as its own."""
    monkeypatch.setenv("SPOLIA_ADDRESS", gateway.address)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*argv: str) -> Done:
        with pytest.raises(SystemExit) as ended:
            main(argv)
        captured = capsys.readouterr()
        code = ended.value.code
        return Done(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text("A page.")
    return path


def test_generate_prints_the_text_and_says_what_was_reused_elsewhere(spolia: Spolia) -> None:
    done = spolia("generate", "Say hello")
    assert (done.code, done.out) == (0, "Héllo\n")
    assert "4 tokens" in done.err
    assert "112 of 140 prompt tokens reused, 1.2 KiB moved" in done.err
    assert "missed 30 tokens of a local chunk: store late" in done.err


def test_generate_without_streaming_prints_the_same(spolia: Spolia) -> None:
    assert spolia("generate", "--no-stream", "Say hello").out == "Héllo\n"


def test_generate_puts_documents_first_and_reads_standard_input(
    spolia: Spolia, page: Path, gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    done = spolia(
        "generate", "Read.", "-", "--document", str(page), "--mode", "linked", "--max-tokens", "9", "--seed", "3"
    )
    assert done.code == 0
    (request,) = gateway.requests
    assert (request.parts[0].document.text, request.parts[0].document.name) == ("A page.", str(page))
    assert [part.text for part in request.parts[1:]] == ["Read.", "from a pipe"]
    assert (request.mode, request.sampling.max_tokens, request.sampling.seed) == (2, 9, 3)


def test_generate_takes_a_constraint_from_a_file_or_an_option(
    spolia: Spolia, tmp_path: Path, gateway: FakeGateway
) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.lark"
    schema.write_text('{"type": "object"}')
    grammar.write_text('start: "a"')
    for options in (
        ["--json-schema", str(schema)],
        ["--json-object"],
        ["--regex", "[0-9]+"],
        ["--choice", "yes", "--choice", "no"],
        ["--lark", str(grammar)],
    ):
        assert spolia("generate", *options, "Hi").code == 0
    asked = [request.sampling for request in gateway.requests]
    kinds = ["json_schema", "json_object", "regex", "choices", "lark"]
    assert [sampling.WhichOneof("constraint") for sampling in asked] == kinds
    assert (asked[0].json_schema, asked[4].lark) == ('{"type": "object"}', 'start: "a"')
    assert list(asked[3].choices.texts) == ["yes", "no"]
    refused = spolia("generate", "--json-object", "--regex", "a", "Hi")
    assert refused.code == 2
    assert "one constraint" in refused.err
    schema.write_text("{")
    assert spolia("generate", "--json-schema", str(schema), "Hi").code == 2


def test_generate_as_json_is_one_object(spolia: Spolia) -> None:
    answer = spolia("generate", "--json", "Hi").json
    assert (answer["text"], answer["token_ids"], answer["finish_reason"]) == ("Héllo", [5, 6, 7, 8], "length")
    assert (answer["mode"], answer["seed"]) == ("linked", 7)
    reuse = answer["reuse"]
    assert reuse["sources"] == {"computed": 12, "link": 16, "device": 72, "host": 40}
    assert (reuse["num_reused_tokens"], reuse["bytes_moved"]) == (112, 1230)
    assert reuse["misses"] == [{"chunk_id": "01" * 32, "kind": "local", "reason": "store_late", "num_tokens": 30}]


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.InvalidRequest, 2),
        (errors.Unavailable, 3),
        (errors.DeadlineExceeded, 3),
        (errors.Busy, 4),
        (errors.NotFound, 1),
        (errors.NotSupported, 1),
        (errors.InternalError, 1),
    ],
)
def test_each_error_is_one_line_and_has_its_exit_code(
    kind: type[SpoliaError], code: int, spolia: Spolia, gateway: FakeGateway
) -> None:
    gateway.failure = kind("this went wrong", field="parts[0]", limit="10 tokens")
    once = ["generate", "--retry", "0"]
    for argv in ([*once, "Hi"], [*once, "--json", "Hi"], ["cluster"], ["cluster", "--json"]):
        done = spolia(*argv)
        assert (done.code, done.out) == (code, "")
        assert done.err == "error: this went wrong (field: parts[0], limit: 10 tokens)\n"


def test_busy_says_when_to_try_again(spolia: Spolia, gateway: FakeGateway) -> None:
    gateway.failure = errors.Busy("full", retry_after_ms=250)
    assert spolia("generate", "Hi").err == "error: full (try again in 250 ms)\n"


def test_nobody_at_the_address_is_code_3(spolia: Spolia) -> None:
    assert spolia("generate", "--address", "127.0.0.1:1", "--retry", "0", "Hi").code == 3


def test_a_late_answer_is_code_3(spolia: Spolia, gateway: FakeGateway) -> None:
    gateway.script = [delta("Hé", [5], 0, 0), Hang()]
    done = spolia("generate", "--timeout", "0.3", "Hi")
    assert (done.code, done.out) == (3, "Hé")


@pytest.mark.parametrize(
    "argv",
    [
        ["generate"],
        ["generate", "--no-such-option"],
        ["generate", "--mode", "fast", "Hi"],
        ["generate", "--temperature", "-1", "Hi"],
        ["generate", "--document", "no/such/file"],
        ["generate", "--address", "nonsense", "Hi"],
        ["warm"],
        ["warm", "no/such/file"],
        ["serve", "toaster"],
        ["bench", "toaster"],
        ["no-such-command"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_code_2_and_asks_nobody(argv: list[str], spolia: Spolia, gateway: FakeGateway) -> None:
    done = spolia(*argv)
    assert (done.code, done.out) == (2, "")
    assert done.err
    assert "Traceback" not in done.err
    assert gateway.requests == []


def test_warm_takes_files_and_folders_and_reports_each(spolia: Spolia, tmp_path: Path, gateway: FakeGateway) -> None:
    (tmp_path / "b.md").write_text("bb")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.md").write_text("ccc")
    (tmp_path / "sub" / "empty.md").touch()
    (tmp_path / "skip.bin").write_bytes(b"\xff")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "d.md").write_text("dddd")
    done = spolia("warm", "--json", "--glob", "*.md", str(tmp_path))
    assert [document["num_tokens"] for document in done.json["documents"]] == [2, 3]
    assert (done.json["num_documents"], done.json["num_already_stored"], done.json["num_tokens"]) == (2, 1, 5)
    assert "empty.md" in done.err
    assert [document.text for document in gateway.requests[0].documents] == ["bb", "ccc"]


def test_warm_names_a_file_that_is_not_text(spolia: Spolia, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\xff")
    done = spolia("warm", str(tmp_path))
    assert done.code == 2
    assert "a.bin is not UTF-8 text" in done.err


def test_warm_says_how_much_was_warm_before(spolia: Spolia, page: Path) -> None:
    done = spolia("warm", str(page))
    assert (done.code, done.out) == (0, "")
    assert "warm documents: 1, 1 of them since before; 7 tokens, 100 B" in done.err


def test_warm_says_how_much_was_computed_and_how_long_it_took(spolia: Spolia, page: Path) -> None:
    (page.parent / "other.md").write_text("bb")
    report = spolia("warm", "--json", str(page.parent)).json
    assert (report["num_chunks"], report["num_computed_chunks"], report["size_bytes"]) == (6, 2, 200)
    assert report["elapsed_s"] >= 0
    assert "2 of 6 chunks computed" in spolia("warm", str(page.parent)).err


def corpus(folder: Path, num_files: int) -> Path:
    for number in range(num_files):
        (folder / f"{number:03}.md").write_text(f"text {number}")
    return folder


def test_warm_sends_a_large_corpus_in_several_requests(spolia: Spolia, tmp_path: Path, gateway: FakeGateway) -> None:
    report = spolia("warm", "--json", str(corpus(tmp_path, 200))).json
    assert [Path(document["name"]).stem for document in report["documents"]] == [f"{n:03}" for n in range(200)]
    assert [document["index"] for document in report["documents"]] == list(range(200))
    sizes = [len(request.documents) for request in gateway.requests]
    assert (sum(sizes), max(sizes)) == (200, 64)


def test_warm_sends_large_documents_in_requests_of_their_own(
    spolia: Spolia, tmp_path: Path, gateway: FakeGateway
) -> None:
    for number in range(3):
        (tmp_path / f"{number}.md").write_text("x" * (700 << 10))
    assert spolia("warm", str(tmp_path)).code == 0
    assert [len(request.documents) for request in gateway.requests] == [1, 1, 1]


def test_warm_names_documents_that_fail_and_goes_on_with_the_others(
    spolia: Spolia, tmp_path: Path, gateway: FakeGateway
) -> None:
    gateway.warm_failures["text 17"] = errors.InvalidRequest("document has too many tokens", field="documents[1].text")
    gateway.warm_failures["text 90"] = errors.Unavailable("no store kept its 7 bytes")
    (corpus(tmp_path, 100) / "broken.md").write_bytes(b"\xff")
    done = spolia("warm", "--retry", "0.3", "--json", str(tmp_path))
    assert done.code == 2
    assert {Path(failure["name"]).stem for failure in done.json["failures"]} == {"017", "090", "broken"}
    assert (done.json["num_documents"], done.json["num_failed"], done.json["num_untried"]) == (98, 3, 0)
    for words in ("017.md", "090.md", "document has too many tokens", "no store kept", "broken.md is not UTF-8 text"):
        assert words in done.err
    gateway.warm_failures.clear()
    (tmp_path / "broken.md").write_text("sound")
    assert spolia("warm", str(tmp_path)).code == 0


def test_warm_gives_up_when_the_cluster_fails(spolia: Spolia, tmp_path: Path, gateway: FakeGateway) -> None:
    gateway.failure = errors.Unavailable("no prefill node serves model 'tiny' now")
    done = spolia("warm", "--retry", "0.3", str(corpus(tmp_path, 500)))
    assert done.code == 3
    assert "no prefill node" in done.err
    assert "run it again to go on" in done.err
    assert len(gateway.requests) < 100


@pytest.mark.parametrize("command", [["generate", "--document"], ["warm"], ["cache", "forget"]], ids=" ".join)
def test_a_gateway_that_is_being_replaced_is_asked_again(
    command: list[str], spolia: Spolia, page: Path, gateway: FakeGateway
) -> None:
    gateway.failure = errors.Unavailable("draining")
    assert spolia(*command, str(page), "--retry", "0").code == 3
    assert len(gateway.requests) <= 2  # `warm` asks once more, to find what is to blame
    back = threading.Timer(0.3, setattr, (gateway, "failure", None))
    back.start()
    assert spolia(*command, str(page)).code == 0
    back.join()


def test_warm_waits_for_a_busy_gateway(spolia: Spolia, tmp_path: Path, gateway: FakeGateway) -> None:
    gateway.busy_times = 3
    done = spolia("warm", "--json", str(corpus(tmp_path, 3)))
    assert (done.code, done.json["num_documents"]) == (0, 3)


def test_an_interrupted_warm_ends_its_requests(tmp_path: Path, gateway: FakeGateway) -> None:
    gateway.hang = True
    process = subprocess.Popen(
        [sys.executable, "-m", "spolia.cli.main", "warm", "--address", gateway.address, str(corpus(tmp_path, 300))],
        stderr=subprocess.PIPE,
        # What runs the tests in the background may have had interrupts ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline_s = time.monotonic() + PATIENCE_S
        while not gateway.requests and time.monotonic() < deadline_s:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode != 0
    assert gateway.caller_gone.wait(PATIENCE_S)


def test_warm_draws_no_bar_where_there_is_no_terminal(spolia: Spolia, page: Path) -> None:
    assert len(spolia("warm", str(page)).err.splitlines()) == 1


def test_warm_with_a_limit_that_no_document_can_have_asks_nobody(
    spolia: Spolia, tmp_path: Path, gateway: FakeGateway
) -> None:
    done = spolia("warm", "--split-max-tokens", "5", str(corpus(tmp_path, 9)))
    assert (done.code, gateway.requests) == (2, [])
    assert "splitting.max_tokens" in done.err


@pytest.mark.parametrize("command", [["generate", "--document"], ["warm"], ["cache", "forget"]], ids=" ".join)
def test_a_splitter_reaches_the_gateway(command: list[str], spolia: Spolia, page: Path, gateway: FakeGateway) -> None:
    assert spolia(*command, str(page)).code == 0
    assert not gateway.requests[-1].HasField("splitting")
    done = spolia(*command, str(page), "--splitter", "sentence", "--split-max-tokens", "256")
    assert done.code == 0
    assert gateway.requests[-1].splitting == gateway_pb2.Splitting(
        splitter=gateway_pb2.SPLITTER_SENTENCE, max_tokens=256
    )
    assert spolia(*command, str(page), "--splitter", "chapter").code == 2


def test_cluster_shows_every_node(spolia: Spolia) -> None:
    done = spolia("cluster")
    assert done.code == 0
    assert all(word in done.out for word in ("decode-1", "decode", "127.0.0.1:7", "tiny", "serving"))
    node = spolia("cluster", "--json").json["nodes"][0]
    assert (node["node_id"], node["num_running"], node["draining"]) == ("decode-1", 2, False)


def test_cluster_shows_the_ledger_of_every_pool_and_none_of_a_node_without_one(
    spolia: Spolia, gateway: FakeGateway
) -> None:
    gateway.more_nodes.append(
        directory_pb2.NodeRecord(node_id="store-1", role=directory_pb2.NODE_ROLE_KVSTORE, address="127.0.0.1:8")
    )
    header, pool, store = spolia("cluster").out.splitlines()
    starts = {
        title: header.index(f"  {title}") + 2
        for title in ("blocks", "free", "referenced", "cached", "in transfer", "lent")
    }
    shown = {title: int(pool[start:].split()[0]) for title, start in starts.items()}
    assert shown == {"blocks": 64, "free": 34, "referenced": 13, "cached": 12, "in transfer": 3, "lent": 2}
    assert store[starts["blocks"] : header.index("state")].strip() == ""


def test_help_names_the_exit_codes(spolia: Spolia) -> None:
    done = spolia("generate", "--help")
    assert done.code == 0
    assert "3 nobody there" in done.out


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
        assert time.monotonic() - began_s < 5.0
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
    assert _drain_limit_s(settings) == limit_s
    monkeypatch.setenv("SPOLIA_DRAIN_TIMEOUT_S", "30")
    assert _drain_limit_s(["--kvstore.drain-timeout-s", "5"]) == 30.0


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
        assert "export" not in capsys.readouterr().out
        cluster._keys, cluster._tls_dir = "keys.json", tmp_path / "certs"
        _announce(cluster, as_json=False)
    shown = capsys.readouterr().out
    assert "  export SPOLIA_API_KEY=sk-spolia-…" in shown
    assert f"  export SPOLIA_CA_FILE={tmp_path}/certs/ca.crt\n  spolia generate --address" in shown


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
