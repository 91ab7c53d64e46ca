"""A prefill node: its parts, wired, and its life."""

from __future__ import annotations

from functools import partial

from spolia.v1.directory_pb2 import NODE_ROLE_KVSTORE, NODE_ROLE_PREFILL, NodeLoad
from spolia.v1.prefill_pb2 import DESCRIPTOR
from spolia.v1.prefill_pb2_grpc import add_PrefillServiceServicer_to_server
from spolia_engine.engine import Engine
from spolia_engine.joint_pass import run_slices
from spolia_prefill.compile import Compiler
from spolia_prefill.config import PrefillConfig
from spolia_prefill.context import ContextPrefiller
from spolia_prefill.link import Linker
from spolia_prefill.server import PrefillServer
from spolia_worker.engine_metrics import EngineMetrics
from spolia_worker.engine_thread import EngineThread
from spolia_worker.loading import load_terms
from spolia_worker.node import WorkerNode
from spolia_worker.record import load_of

SERVICE = DESCRIPTOR.services_by_name["PrefillService"].full_name


class PrefillNode(WorkerNode[PrefillConfig]):
    """The parts of a prefill node, wired. `start`, a drain of `server`, then `close` bound its life.

    Making one reads the model's profile, and raises `SpoliaError` for one that cannot be used.
    """

    def __init__(self, config: PrefillConfig, engine: Engine) -> None:
        super().__init__(config, engine, load_terms(config, engine), NODE_ROLE_PREFILL, [NODE_ROLE_KVSTORE])
        self.thread = EngineThread(
            "prefill-engine",
            turn_tokens=lambda: config.slice_tokens,
            run_slices=partial(run_slices, engine.adapter),
            metrics=EngineMetrics(self.server.metrics),
        )
        store_share, slice_tokens = config.store_share, config.slice_tokens
        self.service = PrefillServer(
            config,
            engine,
            Compiler(engine, self.thread, self.store, self.claims, self.publisher, store_share, slice_tokens),
            ContextPrefiller(engine, self.thread, self.fetcher, store_share, slice_tokens),
            Linker(engine, self.thread, self.fetcher, store_share, slice_tokens),
            self.server.check_accepting,
        )
        self.server.add(lambda server: add_PrefillServiceServicer_to_server(self.service, server), SERVICE)

    def _load(self) -> NodeLoad:
        """From any thread."""
        return load_of(
            self.engine,
            num_running=self.service.num_running,
            num_waiting=self.thread.queue_length,
            queued_tokens=self.service.queued_tokens,
        )
