"""Certificates of an authority made for a test, and nodes and callers that use them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import grpc
from node_worlds import with_store

from spolia.local_authority import LocalAuthority, init_authority
from spolia_core.node_name import node_dns_name
from spolia_node.certificates import NodeCertificates
from spolia_node.config import NodeConfig
from spolia_node.server import NodeServer
from spolia_node.tls import channel_credentials

DAY = timedelta(days=1)


def authority_in(folder: Path) -> Path:
    """A folder with certificates of every role."""
    init_authority(folder, DAY)
    return folder


def expired(folder: Path, role: str) -> None:
    """Replaces a role's certificate by one whose time is over, under the same authority."""
    LocalAuthority.open(folder).issue(folder, role, timedelta(seconds=-1))


@asynccontextmanager
async def serving_tls(folder: Path, role: str = "kvstore") -> AsyncIterator[NodeServer]:
    """A node of `role` with a scripted store and directory."""
    server = with_store(NodeServer(NodeConfig(tls_dir=folder), role))
    await server.start()
    try:
        yield server
    finally:
        await server.stop_at_once()


def credentials_of(folder: Path, role: str) -> grpc.ChannelCredentials:
    return channel_credentials(NodeCertificates(folder, role).current())


def credentials_unchecked(folder: Path, role: str, authority: Path | None = None) -> grpc.ChannelCredentials:
    """Whatever the files hold, as somebody with bad intent would use it; believing another authority if asked."""
    believed = (authority or folder) / "ca.crt"
    return grpc.ssl_channel_credentials(
        believed.read_bytes(), (folder / f"{role}.key").read_bytes(), (folder / f"{role}.crt").read_bytes()
    )


def channel_to(address: str, credentials: grpc.ChannelCredentials, role: str = "kvstore") -> grpc.aio.Channel:
    options = [("grpc.ssl_target_name_override", node_dns_name(role)), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.secure_channel(address, credentials, options=options)
