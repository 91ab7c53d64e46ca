from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import fake_gateway
import pytest
from fake_gateway import FakeGateway

from spolia import AsyncClient, Client

Call = Callable[..., Any]


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    fake = FakeGateway()
    server = fake_gateway.start(fake)
    yield fake
    server.stop(grace=None).wait(fake_gateway.PATIENCE_S)


@pytest.fixture(params=["blocking", "asyncio"])
def call(request: pytest.FixtureRequest, gateway: FakeGateway) -> Call:
    """`call("generate", …)` on a fresh client, of either kind: what holds for one holds for its twin."""

    def blocking(method: str, *args: Any, **options: Any) -> Any:
        with Client(gateway.address) as client:
            return getattr(client, method)(*args, **options)

    def on_a_loop(method: str, *args: Any, **options: Any) -> Any:
        async def run() -> Any:
            async with AsyncClient(gateway.address) as client:
                return await getattr(client, method)(*args, **options)

        return asyncio.run(run())

    return blocking if request.param == "blocking" else on_a_loop
