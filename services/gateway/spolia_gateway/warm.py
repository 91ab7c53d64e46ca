"""Computes documents before anyone asks about them."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import grpc

from spolia.v1 import directory_pb2, gateway_pb2, prefill_pb2, prefill_pb2_grpc
from spolia_core.chunk_object import RAW_CODEC
from spolia_core.errors import SpoliaError, Unavailable
from spolia_gateway.attempts import Attempts, RetryPolicy
from spolia_gateway.catalog import ModelKey
from spolia_gateway.failures import NodeLost, failure_of
from spolia_gateway.in_flight import InFlight
from spolia_gateway.routing import order_prefill_nodes
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline
from spolia_node.interceptor import REQUEST_ID_KEY
from spolia_node.logs import get_log
from spolia_node.membership import ClusterView
from spolia_node.store_client import StoreClient

log = get_log(__name__)


@dataclass(frozen=True, slots=True)
class DocumentChunk:
    """A document as a local chunk."""

    chunk_id: bytes
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WarmRequest:
    """Documents of one tenant to be computed for one model, in the order in which the client named them."""

    request_id: str
    tenant_id: str
    model: ModelKey
    documents: tuple[DocumentChunk, ...]


@dataclass(frozen=True, slots=True)
class _Warmed:
    """A chunk that is in the store now."""

    chunk: DocumentChunk
    size_bytes: int
    already_stored: bool
    elapsed_ms: float


class Warmer:
    """Has documents compiled by prefill nodes, each once. The store is the record: warming again computes nothing."""

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
        """One response per document, as each is done. Closing the iterator cancels what is under way.

        Raises `Unavailable` when the store cannot be reached or no prefill node serves the model; what was done by then
        stays stored.
        """
        indices: defaultdict[bytes, list[int]] = defaultdict(list)
        for index, chunk in enumerate(request.documents):
            indices[chunk.chunk_id].append(index)
        chunks = {chunk.chunk_id: chunk for chunk in request.documents}
        async with aclosing(self._each(request, list(chunks.values()), deadline)) as results:
            async for warmed in results:
                for nth, index in enumerate(indices[warmed.chunk.chunk_id]):
                    yield _progress(index, warmed, repeated=nth > 0)

    async def _each(
        self, request: WarmRequest, chunks: Sequence[DocumentChunk], deadline: Deadline
    ) -> AsyncGenerator[_Warmed, None]:
        started = time.monotonic()
        ids = [chunk.chunk_id for chunk in chunks]
        entries = await self._store.lookup(request.tenant_id, ids, request.model.fingerprint, (), deadline)
        waiting: deque[DocumentChunk] = deque()
        for chunk, entry in zip(chunks, entries, strict=True):
            if entry.HasField("info"):
                yield _Warmed(chunk, entry.info.size_bytes, already_stored=True, elapsed_ms=_ms_since(started))
            else:
                waiting.append(chunk)
        running: set[asyncio.Task[_Warmed]] = set()
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

    async def _compile(self, request: WarmRequest, chunk: DocumentChunk, deadline: Deadline) -> _Warmed:
        """Has one chunk compiled by the prefill node with the least to do, or by the next when that one fails."""
        started, attempts = time.monotonic(), Attempts(self._policy)
        while True:
            node = self._next_node(request.model, chunk, attempts)
            attempts.begin(node.node_id)
            try:
                with self._in_flight_tokens.hold(node.node_id, len(chunk.token_ids)):
                    ready = await self._compile_on(node, request, chunk, deadline)
                found = ready.outcome == prefill_pb2.CHUNK_OUTCOME_FOUND
                return _Warmed(chunk, ready.info.size_bytes, already_stored=found, elapsed_ms=_ms_since(started))
            except SpoliaError as error:
                if isinstance(error, NodeLost):
                    self._cluster.mark_dead(node.node_id)
                log.warning(
                    "compile failed", request_id=request.request_id, prefill_node=node.node_id, error=repr(error)
                )
                attempts.failed(error)

    def _next_node(self, model: ModelKey, chunk: DocumentChunk, attempts: Attempts) -> directory_pb2.NodeRecord:
        nodes = model.served_by(self._cluster.nodes(directory_pb2.NODE_ROLE_PREFILL))
        fresh = [node for node in nodes if not attempts.was_asked(node.node_id)]
        if not fresh:
            raise attempts.error or Unavailable(
                f"no prefill node serves model {model.name!r} now", field="model", actual=model.name
            )
        return order_prefill_nodes(fresh, chunk.chunk_id, self._in_flight_tokens.counts)[0]

    async def _compile_on(
        self, node: directory_pb2.NodeRecord, request: WarmRequest, chunk: DocumentChunk, deadline: Deadline
    ) -> prefill_pb2.ChunkReady:
        deadline.check(f"request {request.request_id}")
        stub = prefill_pb2_grpc.PrefillServiceStub(self._channels.get(node.address))
        done = asyncio.Event()
        call = stub.Prefill(
            _requests(request, chunk, done),
            timeout=deadline.remaining(),
            metadata=((REQUEST_ID_KEY, request.request_id),),
        )
        ready: prefill_pb2.ChunkReady | None = None
        try:
            async for response in call:
                if response.HasField("chunk") and response.chunk.info.chunk_id == chunk.chunk_id:
                    ready = response.chunk
                elif response.HasField("done"):
                    done.set()
        except grpc.RpcError as error:
            if ready is None:  # once it is in the store, how the connection ended changes nothing
                raise failure_of(error, node.node_id, node.address) from error
        finally:
            call.cancel()  # a no-op once the call has ended
        if ready is None:
            raise NodeLost(f"node {node.node_id} at {node.address} ended its work without the chunk")
        return ready


async def _requests(
    request: WarmRequest, chunk: DocumentChunk, done: asyncio.Event
) -> AsyncIterator[prefill_pb2.PrefillRequest]:
    """The start; then the stream stays open until the work is done, because half-closing it would cancel the work."""
    work = prefill_pb2.CompileWork(
        chunks=[prefill_pb2.ChunkToCompile(chunk_id=chunk.chunk_id, token_ids=chunk.token_ids)]
    )
    yield prefill_pb2.PrefillRequest(
        start=prefill_pb2.PrefillStart(
            request_id=request.request_id,
            tenant_id=request.tenant_id,
            fingerprint=request.model.fingerprint,
            accepted_codecs=[RAW_CODEC],
            compile=work,
        )
    )
    await done.wait()


def _progress(index: int, warmed: _Warmed, *, repeated: bool) -> gateway_pb2.WarmResponse:
    """A document that was named before in the same request costs nothing."""
    return gateway_pb2.WarmResponse(
        document_index=index,
        num_tokens=len(warmed.chunk.token_ids),
        size_bytes=warmed.size_bytes,
        already_stored=warmed.already_stored or repeated,
        elapsed_ms=0.0 if repeated else warmed.elapsed_ms,
    )


def _ms_since(started: float) -> float:
    return (time.monotonic() - started) * 1e3
