"""Redis servers for the tests that share them."""

from collections.abc import Iterator
from functools import partial
from uuid import uuid4

import pytest
from redis_server import RedisServer

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
