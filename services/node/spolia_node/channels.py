"""Channels to other nodes: one per address, kept open, quick to notice a dead peer.

A connection keeps the certificate it began with. Once this node's is replaced, new calls go over a new connection, and
the old one is closed when its calls have ended.
"""

from __future__ import annotations

import asyncio

import grpc

from spolia_core.errors import Unavailable
from spolia_core.node_name import node_dns_name
from spolia_node.certificates import Credentials, NodeCertificates
from spolia_node.tls import channel_credentials

KEEPALIVE_TIME_MS = 2_000
"""How often an open connection is probed."""

KEEPALIVE_TIMEOUT_MS = 4_000
"""How long a probe may stay unanswered. With the time above, a silent peer is dead after about six seconds."""


RETIRED_GRACE_S = 900.0
"""How long calls under way on a connection with a replaced certificate have to end; longer than a request may take by
default. Streams to the directory last for ever, and are opened anew then."""


def connection_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """gRPC options of both ends of a connection: its message limit, and how a dead peer is noticed."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        # Probes time out by a clock of their own, of a minute by default, which outlasts the one above.
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """gRPC options of a channel between nodes."""
    return [
        *connection_options(max_message_bytes),
        # A node that comes back is found again within a second or two, and a black hole is given up on as fast.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 2_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # Otherwise connections outlive the channel that is dropped.
        ("grpc.use_local_subchannel_pool", 1),
        # Nodes reach each other directly, whatever proxy the environment names for the outside world.
        ("grpc.enable_http_proxy", 0),
    ]


class ChannelPool:
    """Owns the channels of a process, under TLS where it has certificates. Not for use from several event loops."""

    def __init__(self, max_message_bytes: int, certificates: NodeCertificates | None = None) -> None:
        self._options = channel_options(max_message_bytes)
        self._certificates = certificates
        self._credentials: Credentials | None = None
        self._channels: dict[tuple[str, str], grpc.aio.Channel] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    def get(self, address: str, role: str) -> grpc.aio.Channel:
        """The channel to "host:port"; connects when first used. The pool keeps ownership: do not close it.

        Under TLS whoever answers there must have a certificate of `role`; else calls fail with UNAVAILABLE. Raises
        `Unavailable` once the pool is closed.
        """
        if self._closed:
            raise Unavailable("no new calls: this node is shutting down")
        self._take_new_certificate()
        channel = self._channels.get((address, role))
        if channel is None:
            channel = self._channels[address, role] = self._connect(address, role)
        return channel

    def drop(self, address: str) -> None:
        """Closes the channel to a peer known to be dead; the next `get` connects anew.

        Calls under way on it end at once, for those who await them as if they had been cancelled: make calls inside
        `spolia_node.calls.call_errors`, which tells that from a cancel of the caller's own task.
        """
        for known in [known for known in self._channels if known[0] == address]:
            channel = self._channels.pop(known)
            _keep(asyncio.get_running_loop().create_task(channel.close(None)), self._closing)

    def look_again(self, address: str) -> None:
        """Says that somebody has begun to serve at `address`: the next call connects at once.

        A channel whose last try failed waits for up to two seconds before the next, and fails calls meanwhile. One that
        is connected, or has nothing to lose, is left as it is.
        """
        for (at, _), channel in list(self._channels.items()):
            if at == address and channel.get_state() is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                self.drop(address)

    async def close(self) -> None:
        """Closes every channel; running calls end as in `drop`. Idempotent."""
        self._closed = True
        for address, _ in list(self._channels):
            self.drop(address)
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._closing, *self._retiring, return_exceptions=True)

    def _connect(self, address: str, role: str) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(address, options=self._options)
        options = [*self._options, ("grpc.ssl_target_name_override", node_dns_name(role))]
        return grpc.aio.secure_channel(address, channel_credentials(self._credentials), options=options)

    def _take_new_certificate(self) -> None:
        if self._certificates is None:
            return
        current = self._certificates.current()
        if current == self._credentials:
            return
        self._credentials = current
        for known in list(self._channels):
            self._retire(self._channels.pop(known))

    def _retire(self, channel: grpc.aio.Channel) -> None:
        _keep(asyncio.get_running_loop().create_task(_close_later(channel)), self._retiring)


async def _close_later(channel: grpc.aio.Channel) -> None:
    """Not `close(grace)`, which finds some calls and cuts others."""
    try:
        await asyncio.sleep(RETIRED_GRACE_S)
    finally:
        await channel.close(None)


def _keep(task: asyncio.Task[None], tasks: set[asyncio.Task[None]]) -> None:
    tasks.add(task)
    task.add_done_callback(tasks.discard)
