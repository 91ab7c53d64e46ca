"""One kvstore node: store, directory and server put together. The only place that knows them all."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping

from spolia.v1.directory_pb2 import NODE_ROLE_KVSTORE, NodeLoad, NodeRecord
from spolia.version import __version__
from spolia_core.key_book import KeyBook
from spolia_core.key_place import key_place
from spolia_kvstore import directory_server, server
from spolia_kvstore.config import KVStoreConfig
from spolia_kvstore.directory import Directory
from spolia_kvstore.directory_server import DirectoryServer
from spolia_kvstore.housekeeping import Housekeeping
from spolia_kvstore.index_sync import IndexSync
from spolia_kvstore.metrics import StoreCollector
from spolia_kvstore.opening import open_store
from spolia_kvstore.quotas import quotas_in, read_quotas
from spolia_kvstore.server import KVStoreServer, LeaseDefaults
from spolia_kvstore.stats import tiers_message
from spolia_node.channels import ChannelPool
from spolia_node.key_watch import KeyWatch
from spolia_node.load_metrics import LoadCollector
from spolia_node.logs import get_log
from spolia_node.membership import Registration
from spolia_node.server import NodeServer

SWEEP_EVERY_S = 1.0
log = get_log(__name__)


class KVStoreNode:
    """A kvstore node. `start` it on a running loop, then end it with `drain` or `stop_at_once`, then `close`.

    It registers like any node: with the directory named in its settings, else with its own. Making one opens and
    repairs the data folder, and raises `InvalidRequest` for settings that cannot be used.
    """

    def __init__(self, config: KVStoreConfig) -> None:
        self.config = config
        self.directory = Directory(config.node_lease_ms / 1000)
        self.server = NodeServer(config, "kvstore")
        self.store = open_store(config, self._stores)
        self._own_quotas = read_quotas(config.quotas_file) if config.quotas_file is not None else {}
        self._keys = self._watch_keys()
        self.housekeeping = Housekeeping(self.store, self._served_fingerprints)
        self._channels = ChannelPool(config.max_message_bytes, self.server.certificates)
        self._index_sync = IndexSync(self.store)
        self._tasks: set[asyncio.Task[None]] = set()
        self._kvstore_server = KVStoreServer(
            self.store,
            self.housekeeping,
            self.server.check_accepting,
            LeaseDefaults(config.claim_ttl_ms, config.pin_lease_ms, config.rpc_timeout_s),
        )
        self._directory_server = DirectoryServer(self.directory, self.store.backend, on_left=self._release_node)
        self.server.add(self._kvstore_server.register, server.SERVICE)
        self.server.add(self._directory_server.register, directory_server.SERVICE)
        self.server.on_drain += [self._kvstore_server.close, self._end_directory, self.store.tiers.writes.write_all]
        registry = self.server.metrics.registry
        registry.register(StoreCollector(self.store))
        registry.register(LoadCollector("kvstore", lambda: NodeLoad(num_running=self.store.tiers.num_transfers)))

    async def start(self) -> str:
        """Serves; the address. Raises `InvalidRequest` for a port that cannot be bound."""
        await self.server.start()
        self._index_sync.start()
        if self._keys is not None:
            self._keys.start()
        await self.store.backend.start()
        await self._directory_server.start()
        self._in_background(self._sweep())
        if self.config.write_behind_s > 0:
            self._in_background(self._write_behind())
        registration = Registration(self._channels, self.config.directory or self.server.address, self._record)
        registration.start()
        self.server.registration = registration
        return self.server.address

    async def close(self) -> None:
        """Gives back what is left once the server has ended. Idempotent."""
        if self._keys is not None:
            await self._keys.stop()
        await self._directory_server.close()
        await self._index_sync.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channels.close()
        await self.store.close()
        await self.store.backend.close()
        self.store.catalog.close()

    def _watch_keys(self) -> KeyWatch | None:
        if not self.config.keys:
            return None
        keys = KeyWatch(key_place(self.config.keys), self.server.metrics, self._take_quotas)
        self._take_quotas(keys.book)
        return keys

    def _take_quotas(self, book: KeyBook) -> None:
        self.store.tenants.set_quotas(quotas_in(book) | self._own_quotas)

    async def _end_directory(self) -> None:
        """Ends streams to the directory; this node's own first, where it is to this very directory."""
        if self.server.registration is not None and not self.config.directory:
            await self.server.registration.stop()
        await self._directory_server.close()

    def _stores(self) -> Mapping[str, str]:
        """Live stores, this one always among them."""
        here = {self.config.node_id: self.server.address}
        return {node.node_id: node.address for node in self.directory.nodes({NODE_ROLE_KVSTORE})} | here

    def _served_fingerprints(self) -> set[bytes]:
        return {node.model.fingerprint for node in self.directory.nodes() if node.HasField("model")}

    def _release_node(self, node_id: str) -> None:
        self._in_background(self.store.release_node(node_id))

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            try:
                await self.store.sweep()
            except Exception:
                log.exception("sweep failed")

    async def _write_behind(self) -> None:
        delay_s = self.config.write_behind_s
        while True:
            await asyncio.sleep(min(SWEEP_EVERY_S, delay_s))
            try:
                await self.store.tiers.writes.write_behind(delay_s)
            except Exception:
                log.exception("writing behind failed")

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _record(self) -> NodeRecord:
        return NodeRecord(
            node_id=self.config.node_id,
            role=NODE_ROLE_KVSTORE,
            address=self.server.address,
            load=NodeLoad(num_running=self.store.tiers.num_transfers, tiers=tiers_message(self.store)),
            draining=self.server.leaving,
            version=__version__,
            metrics_address=self.server.metrics_address,
        )
