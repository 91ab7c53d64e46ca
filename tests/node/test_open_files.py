"""A process gets as many open files as its system gives, and starts wherever that is less."""

from __future__ import annotations

import resource

import pytest
from captured_logs import captured_logs

from spolia_node import process
from spolia_node.config import NodeConfig
from spolia_node.open_files import WANTED, raise_open_files

NONE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "bound", "now"),
    [
        (1024, 4096, NONE, 4096),
        (1024, 1 << 30, NONE, WANTED),
        (1024, NONE, NONE, WANTED),
        (256, NONE, 61_440, WANTED // 2),
        (256, NONE, 256, 256),
        (WANTED + 1, NONE, NONE, WANTED + 1),
        (NONE, NONE, NONE, NONE),
    ],
)
def test_the_limit_is_raised_as_far_as_the_system_lets_it_and_never_lowered(
    soft: int, hard: int, bound: int, now: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = (soft, hard)

    def set_limits(which: int, wanted: tuple[int, int]) -> None:
        nonlocal limits
        if bound != NONE and wanted[0] > bound:
            raise ValueError("current limit exceeds maximum limit")
        limits = wanted

    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", set_limits)
    assert raise_open_files() == now
    assert limits == (now, hard)


class _Crowded(NodeConfig):
    @property
    def max_client_files(self) -> int:
        return 8192


@pytest.mark.parametrize(("limit", "is_said"), [(8191, True), (8192, False), (NONE, False)])
def test_a_node_says_at_its_start_when_clients_may_take_more_files_than_it_has(limit: int, is_said: bool) -> None:
    with captured_logs() as lines:
        process._check_open_files(_Crowded(), limit)
        process._check_open_files(NodeConfig(), limit)
    assert [(line["log_level"], line["limit"], line["max_client_files"]) for line in lines] == (
        [("warning", limit, 8192)] if is_said else []
    )
