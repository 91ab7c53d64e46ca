"""The cluster that is measured, and the calls to its nodes that users do not make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc

from spolia import Client
from spolia.connection import DEFAULT_MAX_MESSAGE_BYTES, channel_options
from spolia.local_cluster import LocalCluster

TIMEOUT_S = 900.0


class System:
    """A running cluster of one node per role, a client of its gateway and a channel to each node."""

    def __init__(self, cluster: LocalCluster, client: Client) -> None:
        self.cluster = cluster
        self.client = client
        self._channels: dict[str, grpc.Channel] = {}

    def channel(self, role: str) -> grpc.Channel:
        """To the node of `role`."""
        if role not in self._channels:
            address = next(node.address for node in self.cluster.nodes if node.role == role)
            self._channels[role] = grpc.insecure_channel(address, options=channel_options(address))
        return self._channels[role]

    def close(self) -> None:
        """Ends the channels."""
        for channel in self._channels.values():
            channel.close()


@contextmanager
def running(model: Path, threads: int, settings: Sequence[str]) -> Iterator[System]:
    """Starts a cluster and ends it. Whichever node works may have every core: one request is measured at a time."""
    cluster = LocalCluster(model, settings=["--log-level", "warning", *settings], engine_threads=threads)
    with cluster, Client(cluster.address, timeout_s=TIMEOUT_S, max_message_bytes=DEFAULT_MAX_MESSAGE_BYTES) as client:
        system = System(cluster, client)
        try:
            yield system
        finally:
            system.close()
