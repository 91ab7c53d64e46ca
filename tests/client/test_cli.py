"""Laws of the `spolia` command, against a gateway whose answers are written down beforehand."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_gateway import PATIENCE_S, FakeGateway, Hang, delta

from spolia import SpoliaError, errors
from spolia.cli.main import main
from spolia.v1 import directory_pb2, gateway_pb2


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


def test_warm_of_a_folder_leaves_out_what_is_no_text_or_too_long_and_says_why(
    spolia: Spolia, tmp_path: Path, gateway: FakeGateway
) -> None:
    corpus(tmp_path, 9)
    (tmp_path / "page.png").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "curve.svg").write_text("<svg/>")
    (tmp_path / "schema.fbs").write_text("text 9")  # which some machines call a picture
    (tmp_path / "nobody-knows").write_bytes(b"\xff")
    limit = {"field": "documents[0].text", "limit": "8192 tokens", "actual": "9000 tokens"}
    gateway.warm_failures["text 3"] = errors.InvalidRequest("document '003.md' has 9000 tokens", **limit)
    done = spolia("warm", "--json", str(tmp_path))
    assert done.code == 0
    names = [f"{n:03}" for n in range(9) if n != 3]
    assert [Path(each["name"]).stem for each in done.json["documents"]] == [*names, "schema"]
    assert {Path(each["name"]).name for each in done.json["left_out"]} == {
        *("page.png", "curve.svg", "nobody-knows", "003.md")
    }
    assert (done.json["num_failed"], done.json["num_left_out"], done.json["num_untried"]) == (0, 4, 0)
    for words in (
        "page.png is a picture",
        "curve.svg is a picture",
        "nobody-knows is not UTF-8",
        "9000 tokens",
    ):
        assert words in done.err
    assert "left out: 4" in spolia("warm", str(tmp_path)).err
    # Who names a file, or its kind, means it.
    assert spolia("warm", str(tmp_path / "003.md")).code == 2
    assert spolia("warm", str(tmp_path / "page.png")).code == 2
    assert spolia("warm", "--json", "--glob", "*.svg", str(tmp_path)).json["num_documents"] == 1


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


HEARS_INTERRUPTS = """
import signal
from spolia.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""
"""The command. What runs the tests in the background may have had interrupts ignored, which children inherit.

It says so itself: a function between fork and exec would have gRPC handle a fork, in this process too, and the server
of these tests may be deaf afterwards.
"""


def test_an_interrupted_warm_ends_its_requests(tmp_path: Path, gateway: FakeGateway) -> None:
    gateway.hang = True
    process = subprocess.Popen(
        [sys.executable, "-c", HEARS_INTERRUPTS, "warm", "--address", gateway.address, str(corpus(tmp_path, 300))],
        stderr=subprocess.PIPE,
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
