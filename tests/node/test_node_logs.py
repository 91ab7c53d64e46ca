"""Log lines say which node and which request, on standard error, whoever writes them."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import structlog
from node_worlds import serving

from spolia.errors import InternalError, error_from_rpc
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


class BrokenStderr(io.StringIO):
    """Takes nothing for as long as it is broken."""

    broken: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        if self.broken is not None:
            raise self.broken
        return super().write(text)


@pytest.mark.parametrize("broken", [OSError(errno.ENOSPC, "disk full"), ValueError("closed")], ids=["full", "closed"])
def test_lines_that_cannot_be_written_are_dropped_and_counted_in_the_next_that_can(
    broken: OSError | ValueError, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stderr", stderr := BrokenStderr())
    configure_logs("info", as_json=True, node_id="n", role="r")
    stderr.broken = broken
    with structlog.contextvars.bound_contextvars(request_id="r-1"):
        get_log("m").info("one")
        get_log("m").error("two")
        logging.getLogger("grpc").error("three")
        stderr.broken = None
        get_log("m").info("four")
    get_log("m").info("five")
    notice, *lines = [json.loads(line) for line in stderr.getvalue().splitlines()]
    assert (notice["event"], notice["level"], notice["node_id"]) == ("3 log lines were lost", "warning", "n")
    assert "request_id" not in notice
    assert [line["event"] for line in lines] == ["four", "five"]


def test_a_full_disk_loses_lines_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a real file's buffer could not write stays lost: it is neither written later nor counted wrongly."""
    path = tmp_path / "log"
    with Path("/dev/full").open("w") as full, path.open("w") as good:
        configure_logs("info", as_json=True, node_id="n", role="r")
        monkeypatch.setattr(sys, "stderr", full)
        get_log("m").info("one")
        monkeypatch.setattr(sys, "stderr", good)
        get_log("m").info("two")
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["1 log lines were lost", "two"]


def test_a_line_cut_short_is_ended_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "log"
    write = os.write
    with path.open("w") as stderr:
        configure_logs("info", as_json=True, node_id="n", role="r")
        monkeypatch.setattr(sys, "stderr", stderr)
        room = [5]

        def write_what_fits(number: int, data: bytes) -> int:
            if not room:
                raise OSError(errno.ENOSPC, "disk full")
            return write(number, data[: room.pop()])

        monkeypatch.setattr(os, "write", write_what_fits)
        get_log("m").info("one")
        monkeypatch.setattr(os, "write", write)
        get_log("m").info("two")
    cut, *lines = path.read_text().splitlines()
    assert len(cut) == 5
    assert [json.loads(line)["event"] for line in lines] == ["1 log lines were lost", "two"]


async def test_a_request_is_answered_though_its_log_line_cannot_be_written(monkeypatch: pytest.MonkeyPatch):
    async def act(_context: object) -> None:
        raise KeyError("logged with its traceback")

    async with serving(act) as world:
        monkeypatch.setattr(sys, "stderr", stderr := BrokenStderr())
        configure_logs("info", as_json=True, node_id="n", role="r")
        stderr.broken = OSError(errno.EFBIG, "file size limit")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await world.unary_unary(timeout=30)
        stderr.broken = None
    assert type(error_from_rpc(failed.value)) is InternalError
