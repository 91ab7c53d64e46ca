from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_gateway
import fake_store
import pytest
from cache_runs import cache, half
from cli_runs import page, spolia
from fake_gateway import Call, FakeGateway
from fake_store import FakeStore

from spolia import AsyncClient, Client
from spolia.local_cluster import ROLES

__all__ = ["cache", "half", "page", "spolia"]  # fixtures

HERE = Path(__file__).parent


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    fake = FakeGateway()
    server = fake_gateway.start(fake)
    yield fake
    server.stop(grace=None).wait(fake_gateway.PATIENCE_S)


@pytest.fixture
def stores() -> Iterator[tuple[FakeStore, FakeStore]]:
    """Two stores that hold nothing yet."""
    fakes = (FakeStore("kvstore-1"), FakeStore("kvstore-2"))
    servers = [fake_store.start(fake) for fake in fakes]
    yield fakes
    for server in servers:
        server.stop(grace=None).wait(fake_gateway.PATIENCE_S)


@pytest.fixture(params=["blocking", "asyncio"])
def call(request: pytest.FixtureRequest, gateway: FakeGateway) -> Call:
    """`call("generate", …)` on a fresh client, of either kind: what holds for one holds for its twin."""

    def blocking(method: str, *args: Any, **options: Any) -> Any:
        with Client(gateway.address, retry_s=0) as client:
            return getattr(client, method)(*args, **options)

    def on_a_loop(method: str, *args: Any, **options: Any) -> Any:
        async def run() -> Any:
            async with AsyncClient(gateway.address, retry_s=0) as client:
                return await getattr(client, method)(*args, **options)

        return asyncio.run(run())

    return blocking if request.param == "blocking" else on_a_loop


@pytest.fixture
def stand_in_env(tmp_path: Path) -> dict[str, str]:
    """An environment in which the services are stand-ins."""
    for role in ROLES:
        package = tmp_path / "packages" / f"spolia_{role}"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(f"import stand_in\nstand_in.main({role!r})\n")
    (tmp_path / "shared").mkdir()
    found_first = [str(tmp_path / "packages"), str(HERE)]
    return {
        "PYTHONPATH": os.pathsep.join([*found_first, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "STAND_IN_FOLDER": str(tmp_path / "shared"),
    }
