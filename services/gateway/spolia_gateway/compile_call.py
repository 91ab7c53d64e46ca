"""One chunk compiled by one prefill node: a stream that is kept open until the work is done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc

from spolia.v1 import directory_pb2, prefill_pb2, prefill_pb2_grpc
from spolia_core.chunk_object import RAW_CODEC
from spolia_gateway.documents import DocumentChunk
from spolia_gateway.failures import failure_of, lost
from spolia_gateway.served_models import ModelKey
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline
from spolia_node.interceptor import REQUEST_ID_KEY
from spolia_node.tracing import trace_metadata


@dataclass(frozen=True, slots=True)
class WarmRequest:
    """Documents of one tenant, as chunks, to be computed for one model; in the order in which the client named them."""

    request_id: str
    tenant_id: str
    model: ModelKey
    documents: tuple[tuple[DocumentChunk, ...], ...]
    cache_salt: str = ""

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, computed already or not."""
        return sum(len(chunk.token_ids) for document in self.documents for chunk in document)


async def compile_on(
    node: directory_pb2.NodeRecord,
    channels: ChannelPool,
    request: WarmRequest,
    chunk: DocumentChunk,
    deadline: Deadline,
) -> prefill_pb2.ChunkReady:
    """What became of the chunk; after INLINE its bytes were not waited for. A cancel frees everything on the node.

    Raises what the node raised, `NodeLost` when it went away, `DeadlineExceeded` when it was late.
    """
    work = f"request {request.request_id}"
    deadline.check(work)
    stub = prefill_pb2_grpc.PrefillServiceStub(channels.get(node.address, "prefill"))
    done = asyncio.Event()
    call = stub.Prefill(
        _requests(request, chunk, done),
        timeout=deadline.remaining(),
        metadata=((REQUEST_ID_KEY, request.request_id), *trace_metadata()),
    )
    ready: prefill_pb2.ChunkReady | None = None
    try:
        async for response in call:
            if response.HasField("chunk") and response.chunk.info.chunk_id == chunk.chunk_id:
                ready = response.chunk
                if ready.outcome == prefill_pb2.CHUNK_OUTCOME_INLINE:
                    break  # its bytes follow, and nobody here wants them
            elif response.HasField("done"):
                done.set()
    except grpc.RpcError as error:
        if ready is None:  # once it is in the store, how the connection ended changes nothing
            raise failure_of(error, node, work) from error
    finally:
        call.cancel()  # a no-op once the call has ended
        done.set()  # and then it would leave the sender of requests waiting
    if ready is None:
        raise lost(node, work, "it ended its work without the chunk")
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
            num_sink_tokens=request.model.num_sink_tokens,
            cache_salt=request.cache_salt,
            compile=work,
        )
    )
    await done.wait()
