"""Logs: one line per lifecycle event, to standard error, as text or JSON. Standard output is for READY lines."""

from __future__ import annotations

import logging
import sys
from typing import Any, cast

import structlog
from structlog.types import EventDict, FilteringBoundLogger, Processor, WrappedLogger

LOG_LEVELS = ("debug", "info", "warning", "error")


class _StderrLogger:
    """Writes lines to whatever standard error is at that moment, so that tests may replace it."""

    def msg(self, message: str) -> None:
        sys.stderr.write(message + "\n")

    debug = info = warning = error = critical = exception = fatal = log = msg


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
    return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=_plain_traceback)]


_plain_traceback: Any = structlog.dev.plain_traceback


def _route_own_logs(level: int, shared: list[Processor], final: list[Processor]) -> None:
    structlog.configure(
        processors=[*shared, *final],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: _StderrLogger(),
        cache_logger_on_first_use=False,
    )


def _route_library_logs(level: int, shared: list[Processor], final: list[Processor]) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(level, logging.WARNING))  # libraries are silent about their normal life
