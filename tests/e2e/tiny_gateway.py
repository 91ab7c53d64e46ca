"""Gateways in this process, in front of the nodes of a tiny world."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tiny_cluster import WAIT_S, World

from spolia import AsyncClient
from spolia.v1 import directory_pb2
from spolia_gateway.config import OFF, GatewayConfig
from spolia_gateway.node import GatewayNode
from spolia_node.deadline import Deadline


@asynccontextmanager
async def a_gateway(world: World, tenant: str, **settings: Any) -> AsyncIterator[GatewayNode]:
    """A gateway that works for `tenant`, and knows a prefill and a decode node."""
    config = GatewayConfig(
        **(
            {"port": 0, "http_port": OFF, "model": world.model, "directory": world.directory, "tenant": tenant}
            | {"log_level": "error"}
            | settings
        )
    )
    node = GatewayNode(config)
    try:
        await node.start()
        roles = (directory_pb2.NODE_ROLE_PREFILL, directory_pb2.NODE_ROLE_DECODE)
        await node.cluster.wait_for(lambda view: all(view.nodes(role) for role in roles), Deadline.after(WAIT_S))
        yield node
    finally:
        await node.server.stop_at_once()
        await node.close()


@asynccontextmanager
async def client_of(world: World, tenant: str, **settings: Any) -> AsyncIterator[AsyncClient]:
    """A client of a gateway of its own, which works for `tenant`."""
    async with (
        a_gateway(world, tenant, **settings) as node,
        AsyncClient(node.server.address, timeout_s=WAIT_S) as client,
    ):
        yield client
