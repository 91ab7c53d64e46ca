"""A decode node: its parts, wired, and its life."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from spolia.v1.decode_pb2 import DESCRIPTOR
from spolia.v1.decode_pb2_grpc import add_DecodeServiceServicer_to_server
from spolia.v1.directory_pb2 import NODE_ROLE_DECODE, NODE_ROLE_KVSTORE, NODE_ROLE_PREFILL, NodeLoad
from spolia_decode.admission import Admission
from spolia_decode.arrivals import Arrivals
from spolia_decode.batch import DecodeBatch
from spolia_decode.config import DecodeConfig
from spolia_decode.link_metrics import LinkMetrics
from spolia_decode.node_parts import NodeParts
from spolia_decode.prefill_client import PrefillClient
from spolia_decode.prefill_nodes import PrefillNodes
from spolia_decode.request_metrics import RequestMetrics
from spolia_decode.server import DecodeServer
from spolia_decode.shadow import ShadowChecks
from spolia_decode.shadow_metrics import ShadowMetrics
from spolia_decode.sharing_switch import load_switch
from spolia_engine.engine import Engine
from spolia_worker.costs import NodeCosts
from spolia_worker.engine_metrics import EngineMetrics
from spolia_worker.engine_thread import EngineThread
from spolia_worker.loading import load_terms
from spolia_worker.node import WorkerNode
from spolia_worker.record import load_of, model_name

SERVICE = DESCRIPTOR.services_by_name["DecodeService"].full_name
WATCHED = (NODE_ROLE_PREFILL, NODE_ROLE_KVSTORE)
PUBLISH_FAREWELL_S = 2.0
HAND_OVER_S = 0.005
"""How long a step may wait for prompts that were just computed to be in it. 13 of them take the event loop 4 ms; their
first tokens would come a pass of others' slices later (43 ms with 8 M parameters)."""


class DecodeNode(WorkerNode[DecodeConfig]):
    """The parts of a decode node, wired. `start`, a drain of `server`, then `close` bound its life.

    Making one reads the model's profile, and raises `SpoliaError` for one that cannot be used.
    """

    def __init__(self, config: DecodeConfig, engine: Engine) -> None:
        engine.decoding.sharing = load_switch(config, engine)
        if engine.decoding.device is not None:
            engine.decoding.device.prepare()
        engine.decoding.deterministic = config.deterministic
        terms = load_terms(config, engine, config.link_tokens, config.min_reused_tokens)
        super().__init__(config, engine, terms, NODE_ROLE_DECODE, WATCHED)
        preemptions = self.server.metrics.counter(
            "spolia_preemptions_total", "Answers that gave their memory to others, to be taken up again later."
        )
        beside = self.server.metrics.counter(
            "spolia_steps_beside_prefill_total", "Decode steps that went through the model with slices of prompts."
        )
        self.batch = DecodeBatch(
            engine, lambda: self.thread.notify(), self._make_room, config.slice_tokens, preemptions.inc, beside.inc
        )
        self.thread = EngineThread(
            "decode-engine",
            self._step,
            turn_tokens=lambda: self.batch.slice_tokens,
            run_slices=self.batch.run_slices,
            hand_over_s=HAND_OVER_S,
            metrics=EngineMetrics(self.server.metrics),
        )
        self.admission = Admission(
            config.max_running,
            config.max_waiting,
            on_idle=self._on_idle,
            available_blocks=self._available_blocks,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self.shadow = self._make_shadow() if config.shadow_share > 0 else None
        self.parts = self._make_parts()
        service = DecodeServer(
            self.parts, self.batch, self.admission, self.server.check_accepting, self.server.run_inside
        )
        self.server.add(lambda server: add_DecodeServiceServicer_to_server(service, server), SERVICE)
        self.server.on_stop.append(service.answer_streams.drain)

    def _make_parts(self) -> NodeParts:
        config, engine = self.config, self.engine
        return NodeParts(
            config=config,
            core=engine,
            terms=self.terms,
            thread=self.thread,
            store=self.store,
            fetcher=self.fetcher,
            publisher=self.publisher,
            claims=self.claims,
            arrivals=Arrivals(),
            prefill=PrefillClient(self.channels),
            prefill_nodes=PrefillNodes(
                self.view, engine.adapter.fingerprint, engine.recipe.num_sink_tokens, config.prefill_share
            ),
            costs=NodeCosts(),
            link_metrics=LinkMetrics(self.server.metrics),
            request_metrics=RequestMetrics(self.server.metrics),
            num_decoding=lambda: self.batch.num_sequences,
            shadow=self.shadow,
        )

    def _make_shadow(self) -> ShadowChecks:
        config = self.config
        metrics = ShadowMetrics(self.server.metrics, model_name(config), self.terms.profile, config.shadow_max_kl)
        shadow = ShadowChecks(config, self.engine, self.thread, metrics, lambda: self.admission.is_idle)
        self.server.on_drain.append(shadow.close)
        return shadow

    def _step(self) -> bool:
        """What the engine's thread does between tasks: requests first."""
        return self.batch.step() or (self.shadow is not None and self.shadow.step())

    def _available_blocks(self) -> int:
        """What a request can have: checks give way to it."""
        return self.engine.pool.available_blocks + (self.shadow.num_held_blocks if self.shadow is not None else 0)

    def _make_room(self) -> bool:
        return self.shadow is not None and self.shadow.make_room()

    def _on_idle(self) -> None:
        if self.shadow is not None:
            self.thread.notify()

    def _on_room(self) -> None:
        """From whichever thread gave blocks back, under the pool's lock."""
        if self.batch.waits_for_room:
            self.thread.notify()
        if self.admission.has_waiters and self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended, and nobody waits
                self._loop.call_soon_threadsafe(self.admission.look_again)

    async def start(self) -> None:
        """Serves, and registers where there is a directory."""
        self._loop = asyncio.get_running_loop()
        self.engine.pool.on_room = self._on_room
        await super().start()

    async def close(self) -> None:
        """Lets go of what is not the server's. Call after a drain: what the last answers sealed is stored first."""
        with suppress(TimeoutError):
            async with asyncio.timeout(PUBLISH_FAREWELL_S):
                await self.publisher.drain()
        await self.publisher.stop()
        await super().close()
        if self.shadow is not None:
            self.shadow.release()

    def _load(self) -> NodeLoad:
        """From any thread."""
        return load_of(
            self.engine,
            num_running=self.admission.num_running,
            num_waiting=self.admission.num_waiting,
            queued_tokens=self.admission.queued_tokens,
        )
