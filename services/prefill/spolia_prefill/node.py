"""A prefill node: its parts, wired, and its life."""

from __future__ import annotations

from functools import partial

from spolia.v1.directory_pb2 import NODE_ROLE_KVSTORE, NODE_ROLE_PREFILL, NodeLoad, NodeRecord
from spolia.v1.prefill_pb2 import DESCRIPTOR
from spolia.v1.prefill_pb2_grpc import add_PrefillServiceServicer_to_server
from spolia_engine.engine import Engine
from spolia_engine.slices import run_slices
from spolia_node.channels import ChannelPool
from spolia_node.load_metrics import LoadCollector
from spolia_node.membership import ClusterView, Registration
from spolia_node.server import NodeServer
from spolia_node.store_client import StoreClient
from spolia_prefill.compile import Compiler
from spolia_prefill.config import PrefillConfig
from spolia_prefill.context import ContextPrefiller
from spolia_prefill.link import Linker
from spolia_prefill.server import PrefillServer
from spolia_worker.chunk_fetch import ChunkFetcher
from spolia_worker.claims import ChunkClaims
from spolia_worker.engine_metrics import EngineMetrics
from spolia_worker.engine_thread import EngineThread
from spolia_worker.loading import load_terms
from spolia_worker.publisher import Publisher
from spolia_worker.record import load_of, node_record

SERVICE = DESCRIPTOR.services_by_name["PrefillService"].full_name


class PrefillNode:
    """The parts of a prefill node, wired. `start`, a drain of `server`, then `close` bound its life.

    Making one reads the model's profile, and raises `SpoliaError` for one that cannot be used.
    """

    def __init__(self, config: PrefillConfig, engine: Engine) -> None:
        self.config = config
        self.engine = engine
        self.terms = load_terms(config, engine)
        self.server = NodeServer(config, "prefill")
        self.channels = ChannelPool(config.max_message_bytes, self.server.certificates)
        self.view = ClusterView(self.channels, config.directory, [NODE_ROLE_KVSTORE]) if config.directory else None
        self.thread = EngineThread(
            "prefill-engine",
            turn_tokens=lambda: config.slice_tokens,
            run_slices=partial(run_slices, engine.adapter),
            metrics=EngineMetrics(self.server.metrics),
        )
        store = StoreClient.of(self.channels, self.view, config.directory)
        self.claims = ChunkClaims(store, config.node_id, config.claim_ttl_s)
        publisher = Publisher(engine, store, timeout_s=config.rpc_timeout_s)
        fetcher = ChunkFetcher(engine, store)
        self.service = PrefillServer(
            config,
            engine,
            Compiler(engine, self.thread, store, self.claims, publisher, config.store_share, config.slice_tokens),
            ContextPrefiller(engine, self.thread, fetcher, config.store_share, config.slice_tokens),
            Linker(engine, self.thread, fetcher, config.store_share, config.slice_tokens),
            self.server.check_accepting,
        )
        self.server.add(lambda server: add_PrefillServiceServicer_to_server(self.service, server), SERVICE)
        self.server.metrics.registry.register(LoadCollector("prefill", self._load))
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
        return node_record(self.server, NODE_ROLE_PREFILL, self.config, self.engine, self.terms, self._load())

    def _load(self) -> NodeLoad:
        """From any thread."""
        return load_of(
            self.engine,
            num_running=self.service.num_running,
            num_waiting=self.thread.queue_length,
            queued_tokens=self.service.queued_tokens,
        )
