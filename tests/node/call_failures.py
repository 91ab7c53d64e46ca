"""How a call fails, as its caller meets it."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from node_worlds import World


def raising(error: BaseException) -> Any:
    async def act(_context: Any) -> None:
        raise error

    return act


async def failure(world: World, shape: str, **call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await getattr(world, shape)(timeout=30, **call)
    return failed.value
