"""A node with an engine, as far as prefill and decode are alike: how its parts are wired, how it begins and ends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Generic, TypeVar

from spolia.v1.directory_pb2 import NodeLoad, NodeRecord, NodeRole
from spolia_core.link_terms import LinkTerms
from spolia_engine.engine import Engine
from spolia_node.channels import ChannelPool
from spolia_node.config import role_of
from spolia_node.load_metrics import LoadCollector
from spolia_node.membership import ClusterView, Registration
from spolia_node.server import NodeServer
from spolia_node.store_client import StoreClient
from spolia_worker.chunk_fetch import ChunkFetcher
from spolia_worker.claims import ChunkClaims
from spolia_worker.config import WorkerConfig
from spolia_worker.engine_thread import EngineThread
from spolia_worker.kernel_choice import KernelChoice
from spolia_worker.publisher import Publisher
from spolia_worker.record import node_record

C = TypeVar("C", bound=WorkerConfig)


class WorkerNode(ABC, Generic[C]):
    """The parts of a node with an engine, wired. `start`, a drain of `server`, then `close` bound its life.

    Who inherits makes `thread`, adds its service to `server`, and says its load.
    """

    thread: EngineThread

    def __init__(
        self,
        config: C,
        engine: Engine,
        terms: LinkTerms,
        role: NodeRole.ValueType,
        watched: Collection[NodeRole.ValueType],
    ) -> None:
        """`watched`: roles whose nodes it calls, as the directory lists them. Without a directory it knows nobody."""
        self.config = config
        self.engine = engine
        self.terms = terms
        self._role = role
        name = role_of(type(config))
        self.server = NodeServer(config, name)
        self.channels = ChannelPool(config.max_message_bytes, self.server.certificates)
        self.view = ClusterView(self.channels, config.directory, watched) if config.directory else None
        self.store = StoreClient.of(self.channels, self.view, config.directory)
        self.fetcher = ChunkFetcher(engine, self.store)
        self.publisher = Publisher(engine, self.store, timeout_s=config.rpc_timeout_s)
        self.claims = ChunkClaims(self.store, config.node_id, config.claim_ttl_s)
        KernelChoice.of(engine.adapter).tell(self.server.metrics)
        self.server.metrics.registry.register(LoadCollector(name, self._load))
        self.server.health.watch(lambda: not self.thread.is_stalled(config.stall_limit_s))

    async def start(self) -> None:
        """Serves, and registers where there is a directory."""
        self.thread.start()
        await self.server.start()
        if self.view is not None:
            self.view.start()
            registration = Registration(self.channels, self.config.directory, self.record)
            registration.start()
            self.server.registration = registration

    async def close(self) -> None:
        """Lets go of what is not the server's. Call after a drain."""
        await self.claims.drain()
        if self.view is not None:
            await self.view.stop()
        await self.thread.stop()
        await self.channels.close()

    def record(self) -> NodeRecord:
        """The node as it is now."""
        return node_record(self.server, self._role, self.config, self.engine, self.terms, self._load())

    @abstractmethod
    def _load(self) -> NodeLoad:
        """How busy it is. From any thread."""
