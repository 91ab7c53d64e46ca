"""Redis servers for the tests that share them, and two stores that share an index in memory."""

from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest
from fake_backend import FakeShared
from kvstore_worlds import HandClock
from redis_server import RedisServer
from site_worlds import Site, open_pair

from spolia_kvstore import opening
from spolia_kvstore.redis_backend import RedisBackend


@pytest.fixture(scope="module", params=["server", "cluster"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis"), cluster=request.param == "cluster") as server:
        yield server


@pytest.fixture
def server(either: RedisServer) -> Iterator[RedisServer]:
    """One of each kind. A test may kill it or stop it: the next has it running again."""
    if not either.is_running:
        either.start()
    yield either
    if either.is_running:
        either.go_on()


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One for all tests that leave it as it was."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores opened by a test do without their Redis when it is gone, and not when the machine is busy."""
    monkeypatch.setattr(opening, "RedisBackend", partial(RedisBackend, timeout_s=20.0))


@pytest.fixture
def prefix() -> str:
    return uuid4().hex


@pytest.fixture
def shared() -> FakeShared:
    """An index that several stores share, in memory."""
    return FakeShared(HandClock())


@pytest.fixture
async def pair(shared: FakeShared, tmp_path: Path) -> AsyncIterator[tuple[Site, Site]]:
    async with open_pair(shared, tmp_path) as sites:
        yield sites
