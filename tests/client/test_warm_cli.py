"""Laws of `spolia warm`, against a gateway whose answers are written down beforehand."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from cli_runs import Spolia
from fake_gateway import PATIENCE_S, FakeGateway

from spolia import errors

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


def test_warm_waits_for_a_busy_gateway(spolia: Spolia, tmp_path: Path, gateway: FakeGateway) -> None:
    gateway.busy_times = 3
    done = spolia("warm", "--json", str(corpus(tmp_path, 3)))
    assert (done.code, done.json["num_documents"]) == (0, 3)


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
