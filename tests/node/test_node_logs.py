"""Log lines say which node and which request, on standard error, whoever writes them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from spolia_node.logs import configure_logs, get_log


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, config = root.handlers[:], root.level, structlog.get_config()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**config)
    structlog.contextvars.clear_contextvars()


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    out, err = capsys.readouterr()
    assert out == ""
    return [json.loads(line) for line in err.splitlines()]


def test_a_line_carries_node_role_module_request_and_what_it_says(capsys: pytest.CaptureFixture[str]):
    configure_logs("info", as_json=True, node_id="decode-1", role="decode")
    with structlog.contextvars.bound_contextvars(request_id="r-1"):
        get_log("spolia_decode.engine").info("request admitted", num_tokens=12)
    (line,) = lines_of(capsys)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "request admitted",
        "level": "info",
        "module": "spolia_decode.engine",
        "node_id": "decode-1",
        "num_tokens": 12,
        "request_id": "r-1",
        "role": "decode",
    }


def test_lines_below_the_level_are_not_written(capsys: pytest.CaptureFixture[str]):
    configure_logs("warning", as_json=True, node_id="n", role="r")
    log = get_log("m")
    log.info("quiet")
    log.warning("loud")
    assert [line["event"] for line in lines_of(capsys)] == ["loud"]


def test_a_traceback_is_inside_its_line(capsys: pytest.CaptureFixture[str]):
    configure_logs("info", as_json=True, node_id="n", role="r")
    try:
        raise ValueError("boom")
    except ValueError:
        get_log("m").exception("failed")
    (line,) = lines_of(capsys)
    assert "ValueError: boom" in line["exception"]


def test_warnings_of_libraries_come_in_the_same_form_and_their_chatter_not_at_all(capsys: pytest.CaptureFixture[str]):
    configure_logs("debug", as_json=True, node_id="n", role="r")
    logging.getLogger("grpc").warning("connection %s lost", 7)
    logging.getLogger("grpc").info("chatter")
    (line,) = lines_of(capsys)
    assert (line["event"], line["logger"], line["node_id"]) == ("connection 7 lost", "grpc", "n")


def test_a_logger_made_before_the_configuration_follows_it(capsys: pytest.CaptureFixture[str]):
    structlog.reset_defaults()
    early = get_log("early")
    early.info("not worth a line in a library")
    configure_logs("info", as_json=True, node_id="n", role="r")
    early.info("said")
    assert [line["event"] for line in lines_of(capsys)] == ["said"]
