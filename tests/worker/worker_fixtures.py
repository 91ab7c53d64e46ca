"""The tiny model, made once, a world for each test that asks, and an engine's thread alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tiny_cluster import World, a_world, write_model

from spolia_node.logs import configure_logs
from spolia_worker.engine_thread import EngineThread


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest_asyncio.fixture
async def world(model: Path) -> AsyncIterator[World]:
    configure_logs("error", False, "test", "test")
    async with a_world(model) as made:
        yield made


@pytest_asyncio.fixture
async def thread() -> AsyncIterator[EngineThread]:
    made = EngineThread("test-engine")
    made.start()
    yield made
    await made.stop()
