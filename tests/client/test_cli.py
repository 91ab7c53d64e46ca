"""Laws of the `spolia` command, against a gateway whose answers are written down beforehand."""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path

import pytest
from cli_runs import Spolia
from fake_gateway import FakeGateway, Hang, delta

from spolia import SpoliaError, errors
from spolia.v1 import directory_pb2, gateway_pb2


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
