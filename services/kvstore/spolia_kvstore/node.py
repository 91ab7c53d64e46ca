"""One kvstore node: store, directory and server put together. The only place that knows them all."""

from __future__ import annotations

from spolia.v1.directory_pb2 import NODE_ROLE_KVSTORE, NodeLoad, NodeRecord
from spolia.version import __version__
from spolia_kvstore import directory_server, server
from spolia_kvstore.config import KVStoreConfig
from spolia_kvstore.directory import Directory
from spolia_kvstore.directory_server import DirectoryServer
from spolia_kvstore.index import SqliteIndex
from spolia_kvstore.metrics import StoreCollector
from spolia_kvstore.object_store import ObjectStore
from spolia_kvstore.server import KVStoreServer, LeaseDefaults
from spolia_kvstore.store import KVStore
from spolia_node.channels import ChannelPool
from spolia_node.membership import Registration
from spolia_node.server import NodeServer


class KVStoreNode:
    """A kvstore node. `start` it on a running loop, then end it with `drain` or `stop_at_once`, then `close`.

    It registers like any node: with the directory named in its settings, else with its own.
    """

    def __init__(self, config: KVStoreConfig) -> None:
        self.config = config
        index = SqliteIndex(config.index_path)
        objects = ObjectStore(config.budget_bytes)
        self.store = KVStore(objects, index, name=config.node_id, max_object_bytes=config.max_object_bytes)
        self.directory = Directory(config.node_lease_ms / 1000)
        self.server = NodeServer(config, "kvstore")
        self._channels = ChannelPool(config.max_message_bytes)
        self._kvstore_server = KVStoreServer(
            self.store, LeaseDefaults(config.claim_ttl_ms, config.pin_lease_ms, config.rpc_timeout_s)
        )
        self._directory_server = DirectoryServer(self.directory, on_left=self.store.release_node)
        self.server.add(self._kvstore_server.register, server.SERVICE)
        self.server.add(self._directory_server.register, directory_server.SERVICE)
        self.server.on_drain += [self._kvstore_server.close, self._directory_server.close]
        self.server.metrics.registry.register(StoreCollector(self.store))

    async def start(self) -> str:
        """Serves; the address. Raises `InvalidRequest` for a port that cannot be bound."""
        await self.server.start()
        self._directory_server.start()
        directory_address = self.config.directory or self.server.address
        registration = Registration(self._channels, directory_address, self._record)
        registration.start()
        self.server.registration = registration
        return self.server.address

    async def close(self) -> None:
        """Gives back what is left once the server has ended. Idempotent."""
        await self._directory_server.close()
        await self._channels.close()
        self.store.index.close()

    def _record(self) -> NodeRecord:
        return NodeRecord(
            node_id=self.config.node_id,
            role=NODE_ROLE_KVSTORE,
            address=self.server.address,
            load=NodeLoad(num_running=self.store.objects.num_transfers),
            draining=not self.server.accepting,
            version=__version__,
        )
