"""What has to be set before any test imports anything, what tests draw, and how processes share the files."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
from file_scheduling import OneClusterScheduling, num_processes
from hypothesis import HealthCheck, settings

# Torch reads it when it is loaded. Processes of a run share the cores: threads that wait must not spin meanwhile.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, whoever imports it first

# Every run draws the same, and however long that takes on a busy machine. `--hypothesis-profile default` draws anew.
settings.register_profile(
    "the same", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("the same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a slow test come first: what is left at the end is short, and every process has something to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True, optionalhook=True)  # not there without xdist
def pytest_xdist_auto_num_workers() -> Iterator[None]:
    """What `-n auto` means, unless xdist is told a number by its variable of the environment."""
    cores: Any = yield
    return cores if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else num_processes(cores)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneClusterScheduling | None:
    """Of `--dist loadfile`; every other way is xdist's own."""
    return OneClusterScheduling(config, log) if config.option.dist == "loadfile" else None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fixtures draw the same numbers, whatever ran before in this process."""
    _seed(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """And so do tests, whatever their fixtures drew: others than those."""
    _seed(2)


def _seed(number: int) -> None:
    random.seed(number)
    torch.manual_seed(number)
