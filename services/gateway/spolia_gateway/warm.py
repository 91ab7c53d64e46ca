"""Computes documents before anyone asks about them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from spolia.v1 import directory_pb2, gateway_pb2, prefill_pb2
from spolia_core.errors import Busy, DeadlineExceeded, SpoliaError, Unavailable
from spolia_gateway.attempts import Attempts, RetryPolicy
from spolia_gateway.compile_call import WarmRequest, compile_on
from spolia_gateway.documents import DocumentChunk
from spolia_gateway.failures import NodeLost, said_inside
from spolia_gateway.in_flight import InFlight
from spolia_gateway.routing import order_prefill_nodes
from spolia_gateway.served_models import ModelKey
from spolia_gateway.store_failures import not_kept, store_failures_in_words
from spolia_gateway.warm_progress import WarmedChunk, WarmProgress
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline
from spolia_node.logs import get_log
from spolia_node.membership import ClusterView
from spolia_node.store_client import StoreClient

log = get_log(__name__)


class Warmer:
    """Has documents' chunks compiled by prefill nodes, each once.

    The store is the record: warming again computes nothing.
    """

    def __init__(
        self,
        cluster: ClusterView,
        channels: ChannelPool,
        store: StoreClient,
        policy: RetryPolicy,
        concurrency: int,
    ) -> None:
        self._cluster = cluster
        self._channels = channels
        self._store = store
        self._policy = policy
        self._concurrency = concurrency
        self._in_flight_tokens = InFlight()

    async def run(self, request: WarmRequest, deadline: Deadline) -> AsyncGenerator[gateway_pb2.WarmResponse, None]:
        """One response per document, once all of its chunks are done. Closing the iterator cancels what is under way.

        Raises `Unavailable` when the store cannot be reached or no prefill node serves the model; what was done by then
        stays stored.
        """
        progress = WarmProgress(request.documents)
        chunks = {chunk.chunk_id: chunk for document in request.documents for chunk in document}
        async with aclosing(self._each(request, list(chunks.values()), deadline)) as results:
            async for warmed in results:
                for response in progress.take(warmed):
                    yield response

    async def _each(
        self, request: WarmRequest, chunks: Sequence[DocumentChunk], deadline: Deadline
    ) -> AsyncGenerator[WarmedChunk, None]:
        started = time.monotonic()
        ids = [chunk.chunk_id for chunk in chunks]
        with store_failures_in_words():
            # Also what is slow to read: it is stored.
            entries = await self._store.lookup(
                request.tenant_id, ids, request.model.fingerprint, (), deadline, ignore_cost=True
            )
        waiting: deque[DocumentChunk] = deque()
        for chunk, entry in zip(chunks, entries, strict=True):
            if entry.HasField("info"):
                yield WarmedChunk(chunk, entry.info.size_bytes, already_stored=True, elapsed_ms=_ms_since(started))
            else:
                waiting.append(chunk)
        running: set[asyncio.Task[WarmedChunk]] = set()
        try:
            while waiting or running:
                while waiting and len(running) < self._concurrency:
                    running.add(asyncio.create_task(self._compile(request, waiting.popleft(), deadline)))
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    warmed = task.result()
                    running.discard(task)
                    yield warmed
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _compile(self, request: WarmRequest, chunk: DocumentChunk, deadline: Deadline) -> WarmedChunk:
        """Has one chunk compiled by the prefill node with the least to do, or by the next when that one fails."""
        started, attempts = time.monotonic(), Attempts(self._policy)
        while True:
            node = await self._next_node(request, chunk, attempts, deadline)
            attempts.begin(node.node_id)
            try:
                with self._in_flight_tokens.hold(node.node_id, len(chunk.token_ids)):
                    ready = await compile_on(node, self._channels, request, chunk, deadline)
                break
            except SpoliaError as error:
                if isinstance(error, NodeLost):
                    self._cluster.mark_dead(node.node_id)
                note = log.debug if isinstance(error, Busy) else log.warning
                note(
                    "compile failed",
                    request_id=request.request_id,
                    prefill_node=node.node_id,
                    error=repr(error),
                    said=said_inside(error),
                )
                attempts.failed(error, refusals_cost=False)
        if ready.outcome == prefill_pb2.CHUNK_OUTCOME_INLINE:
            with store_failures_in_words():
                stats = await self._store.home_stats(chunk.chunk_id, deadline)
            raise not_kept(request.tenant_id, chunk.chunk_id, ready.info.size_bytes, stats)
        found = ready.outcome == prefill_pb2.CHUNK_OUTCOME_FOUND
        return WarmedChunk(chunk, ready.info.size_bytes, already_stored=found, elapsed_ms=_ms_since(started))

    async def _next_node(
        self, request: WarmRequest, chunk: DocumentChunk, attempts: Attempts, deadline: Deadline
    ) -> directory_pb2.NodeRecord:
        """The prefill node with the least to do. Waits while all are busy: nobody is kept from an answer by that."""
        while True:
            fresh = self._not_asked(request.model, attempts)
            if fresh:
                return order_prefill_nodes(fresh, chunk.chunk_id, self._in_flight_tokens.counts)[0]
            if not isinstance(attempts.error, Busy):
                raise attempts.error or _nobody(request.model)
            deadline.check(f"request {request.request_id}")
            try:
                await self._cluster.wait_for(
                    lambda _: bool(self._not_asked(request.model, attempts)), attempts.pause(deadline)
                )
            except DeadlineExceeded:
                attempts.next_round()

    def _not_asked(self, model: ModelKey, attempts: Attempts) -> list[directory_pb2.NodeRecord]:
        nodes = model.served_by(self._cluster.nodes(directory_pb2.NODE_ROLE_PREFILL))
        return [node for node in nodes if not attempts.was_asked(node.node_id)]


def _nobody(model: ModelKey) -> Unavailable:
    return Unavailable(f"no prefill node serves model {model.name!r} now", field="model", actual=model.name)


def _ms_since(started: float) -> float:
    return (time.monotonic() - started) * 1e3
