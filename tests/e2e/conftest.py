"""One cluster of real processes on the demo model, shared by the tests that do not break it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_world import DEMO_MODEL, Oracle

from spolia import Client
from spolia.local_cluster import LocalCluster

sys.path.insert(0, str(Path(__file__).parents[1] / "worker"))  # the tiny model, for tests that need one of their own

from tiny_cluster import write_model


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle(DEMO_MODEL)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Exact contexts are handed over however short they are, and what is stored is fetched: with knowledge of its own
    speed a node may rather compute it, on a busy machine, and the answer then rightly says so.
    """
    logs: Path = tmp_path_factory.mktemp("cluster")
    settings = ["--decode.local-prefill-tokens", "0", "--decode.cost-gate", "false", "--kvstore.cost-gate", "false"]
    with LocalCluster(DEMO_MODEL, log_dir=logs, settings=settings) as running:
        yield running


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster.address, timeout_s=60.0) as connected:
        yield connected
