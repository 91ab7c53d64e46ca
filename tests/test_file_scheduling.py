"""Which tests go to one process together."""

from __future__ import annotations

from pathlib import Path

import pytest
from file_scheduling import ONE_CLUSTER, OneClusterScheduling, num_processes

ROOT = Path(__file__).parents[1]


def piece_of(nodeid: str) -> str:
    scheduling = OneClusterScheduling.__new__(OneClusterScheduling)  # which run it is of does not matter
    return scheduling._split_scope(nodeid)


def test_files_of_one_cluster_are_one_piece_and_every_other_file_is_its_own() -> None:
    assert len({piece_of(f"{file}::test_anything[1]") for file in ONE_CLUSTER}) == 1
    others = ["tests/e2e/test_failures.py", "tests/core/test_ids.py"]
    assert [piece_of(f"{file}::test_anything[a::b]") for file in others] == others


def test_every_file_that_uses_the_session_s_cluster_is_named(request: pytest.FixtureRequest) -> None:
    """Of what this process has collected: in a run of everything, all."""
    users = {
        str(item.path.relative_to(ROOT))
        for item in request.session.items
        if isinstance(item, pytest.Function)
        for found in item._fixtureinfo.name2fixturedefs.get("cluster", ())[-1:]
        if (found.scope, found.baseid) == ("session", "tests/e2e")
    }
    assert users <= ONE_CLUSTER
    assert all((ROOT / file).is_file() for file in ONE_CLUSTER)


def test_there_are_more_processes_than_cores() -> None:
    assert [num_processes(cores) for cores in (1, 2, 3, 8)] == [2, 3, 5, 12]
