"""Logs: one line per lifecycle event, to standard error, as text or JSON. Standard output is for READY lines."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, cast

import structlog
from structlog.types import EventDict, FilteringBoundLogger, Processor, WrappedLogger

LOG_LEVELS = ("debug", "info", "warning", "error")


class _Stderr:
    """Writes lines to whatever standard error is at that moment, so that tests may replace it.

    A line that cannot be written (a full disk, a closed pipe) is dropped: no request fails for want of a log. The next
    one that can be written comes after a line that says how many were lost.
    """

    def __init__(self) -> None:
        self.notice_of: Callable[[int], str] = lambda num_lost: f"{num_lost} log lines were lost"
        self._num_lost = 0
        self._is_cut = False
        self._lock = threading.Lock()

    def write(self, line: str) -> None:
        """Writes one line; never raises for what standard error does."""
        with self._lock:
            lines = [self.notice_of(self._num_lost), line] if self._num_lost else [line]
            try:
                self._write("\n" * self._is_cut + "\n".join(lines) + "\n")
            except (OSError, ValueError):  # ValueError: it was closed
                self._num_lost += 1
            else:
                self._num_lost = 0

    def _write(self, text: str) -> None:
        stream = sys.stderr
        if stream is None:  # a process may have none
            raise ValueError("there is no standard error")
        try:
            number = stream.fileno()
        except (OSError, ValueError, AttributeError):  # a stand-in without a file behind it, or a closed one
            stream.write(text)
            return
        # Past the stream's buffer: that keeps what it could not write, to fail again with it, or to write it after all.
        left = memoryview(text.encode("utf-8", "backslashreplace"))
        while left:
            left = left[os.write(number, left) :]
            self._is_cut = bool(left)


_stderr = _Stderr()


class _StderrLogger:
    """structlog's way to `_Stderr`."""

    def msg(self, message: str) -> None:
        _stderr.write(message)

    debug = info = warning = error = critical = exception = fatal = log = msg


class _StderrHandler(logging.Handler):
    """The standard library's way to `_Stderr`."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            _stderr.write(self.format(record))
        except Exception:
            self.handleError(record)


def configure_logs(level: str, as_json: bool, node_id: str, role: str) -> None:
    """Sets up the whole process's logs, those of libraries included. `level` is one of `LOG_LEVELS`."""
    number = logging.getLevelNamesMapping()[level.upper()]
    shared, final = _shared_processors(node_id, role), _renderer(as_json)
    _route_own_logs(number, shared, final)
    _route_library_logs(number, shared, final)


def get_log(name: str) -> FilteringBoundLogger:
    """A logger whose lines carry `name`, the node, and what is bound to the current request."""
    if not structlog.is_configured():  # a library user, or a test: say what matters, and not on standard output
        _route_own_logs(logging.WARNING, _shared_processors("", ""), _renderer(as_json=False))
    return cast(FilteringBoundLogger, structlog.get_logger(module=name))


def _shared_processors(node_id: str, role: str) -> list[Processor]:
    fixed = {key: value for key, value in (("node_id", node_id), ("role", role)) if value}

    def add_node(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event.update(fixed)
        return event

    return [
        structlog.contextvars.merge_contextvars,
        add_node,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]


def _renderer(as_json: bool) -> list[Processor]:
    if as_json:
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    return [structlog.dev.ConsoleRenderer(colors=_on_terminal(), exception_formatter=_plain_traceback)]


def _on_terminal() -> bool:
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


_plain_traceback: Any = structlog.dev.plain_traceback


def _route_own_logs(level: int, shared: list[Processor], final: list[Processor]) -> None:
    structlog.configure(
        processors=[*shared, *final],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: _StderrLogger(),
        cache_logger_on_first_use=False,
    )
    _stderr.notice_of = _notice_by([*shared[1:], *final])  # without what is bound to a request: it is of none


def _notice_by(processors: list[Processor]) -> Callable[[int], str]:
    def notice_of(num_lost: int) -> str:
        line: Any = {"event": f"{num_lost} log lines were lost", "module": __name__}
        for process in processors:
            line = process(None, "warning", line)
        return str(line)

    return notice_of


def _route_library_logs(level: int, shared: list[Processor], final: list[Processor]) -> None:
    handler = _StderrHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(level, logging.WARNING))  # libraries are silent about their normal life
