"""Calls to prefill nodes. One call, one node: failing over is the caller's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import grpc

from spolia.v1.common_pb2 import Frame, ObjectInfo
from spolia.v1.prefill_pb2 import (
    ChunkOutcome,
    ChunkToCompile,
    CompileWork,
    ContextWork,
    LayerAck,
    LiveKvHeader,
    PrefillRequest,
    PrefillResponse,
    PrefillStart,
)
from spolia.v1.prefill_pb2_grpc import PrefillServiceStub
from spolia_core.chunk_object import KvShape
from spolia_core.digests import check_digest, digest
from spolia_core.errors import DataCorrupt, Unavailable
from spolia_node.calls import call_errors
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline

PrefillCall = grpc.aio.StreamStreamCall[PrefillRequest, PrefillResponse]
END_TIMEOUT_S = 0.5
"""How long the end of a stream may take once its work is done."""

OnLayer = Callable[[int, memoryview, memoryview], None]
"""Takes a layer's K and V bytes, checked, each [num_kv_heads, num_tokens, width]."""


@dataclass(frozen=True, slots=True)
class CompiledChunk:
    """A chunk that is ready: in the store, or here as a checked object in `data`."""

    chunk_id: bytes
    outcome: ChunkOutcome.ValueType
    num_computed_tokens: int
    data: bytes | None


@dataclass(frozen=True, slots=True)
class HandedOff:
    """What a prefill node did for an exact context."""

    first_token: int
    num_bytes: int
    num_computed_tokens: int
    compute_s: float
    """How long its engine took for them."""

    @property
    def seconds_per_token(self) -> float:
        """What a token took; 0 where that was not measured."""
        return self.compute_s / self.num_computed_tokens if self.num_computed_tokens else 0.0


class PrefillClient:
    """Speaks PrefillService."""

    def __init__(self, channels: ChannelPool) -> None:
        self._channels = channels

    async def compile(
        self,
        address: str,
        start: PrefillStart,
        chunks: Sequence[ChunkToCompile],
        inline: bool,
        deadline: Deadline,
        on_chunk: Callable[[CompiledChunk], None],
    ) -> None:
        """Has chunks compiled; `on_chunk` is given each as it becomes ready.

        Raises `Unavailable`, `Busy`, `DeadlineExceeded`, what the node raised, or what `on_chunk` raises.
        """
        inline_chunks = [chunk.chunk_id for chunk in chunks] if inline else []
        start.compile.CopyFrom(CompileWork(chunks=chunks, inline_chunks=inline_chunks))
        async with self._calling(address, start, deadline) as call:
            while (response := await _next(call)) is not None:
                match response.WhichOneof("message"):
                    case "chunk":
                        data = None
                        if response.chunk.outcome == ChunkOutcome.CHUNK_OUTCOME_INLINE:
                            data = await _receive_object(call, response.chunk.info)
                        on_chunk(
                            CompiledChunk(
                                response.chunk.info.chunk_id,
                                response.chunk.outcome,
                                response.chunk.num_computed_tokens,
                                data,
                            )
                        )
                    case "done":
                        await _end(call)
                        return
                    case other:
                        raise DataCorrupt(f"{address} sent {other} where a chunk was due")
        raise Unavailable(f"{address} ended the stream before its work was done")

    async def prefill(
        self,
        address: str,
        start: PrefillStart,
        work: ContextWork,
        shape: KvShape,
        on_layer: OnLayer,
        deadline: Deadline,
    ) -> HandedOff:
        """Has an exact context prefilled. Every layer is checked, given to `on_layer`, then acknowledged.

        Raises `DataCorrupt` for bytes that do not match, and what `compile` raises.
        """
        start.context.CopyFrom(work)
        arrival = _LayerArrival(shape, len(work.token_ids) - work.num_cached_tokens, work.num_cached_tokens)
        first_token: int | None = None
        async with self._calling(address, start, deadline) as call:
            while (response := await _next(call)) is not None:
                match response.WhichOneof("message"):
                    case "live_header":
                        arrival.check(response.live_header)
                    case "layer_frame":
                        done = arrival.take(response.layer_frame.layer, response.layer_frame.frame)
                        if done is not None:
                            on_layer(done, *arrival.layer())
                            await _write(call, PrefillRequest(ack=LayerAck(layer=done)))
                    case "first_token":
                        first_token = response.first_token.token_id
                    case "done" if first_token is not None and arrival.complete:
                        await _end(call)
                        return HandedOff(
                            first_token,
                            arrival.num_bytes,
                            response.done.num_computed_tokens,
                            response.done.compute_ms / 1000,
                        )
                    case other:
                        raise DataCorrupt(f"{address} sent {other} out of order")
        raise Unavailable(f"{address} ended the stream before its work was done")

    @asynccontextmanager
    async def _calling(self, address: str, start: PrefillStart, deadline: Deadline) -> AsyncIterator[PrefillCall]:
        """A stream that has been sent its start message; cancelled on the way out unless it ended."""
        deadline.check("prefill")
        with call_errors(address):
            call: PrefillCall = PrefillServiceStub(self._channels.get(address)).Prefill(
                None, timeout=deadline.remaining()
            )
            try:
                await _write(call, PrefillRequest(start=start))
                yield call
            finally:
                call.cancel()


async def _next(call: PrefillCall) -> PrefillResponse | None:
    """The next response; None at a good end. Raises the call's error at any other."""
    response = await call.read()
    return response if isinstance(response, PrefillResponse) else None


async def _write(call: PrefillCall, request: PrefillRequest) -> None:
    try:
        await call.write(request)
    except asyncio.InvalidStateError:
        await call.read()  # raises what ended the call, which says more
        raise


async def _end(call: PrefillCall) -> None:
    """Lets a call whose work is done end by itself, so that the other side does not take it for a cancel."""
    with suppress(TimeoutError, grpc.RpcError):
        async with asyncio.timeout(END_TIMEOUT_S):
            await call.read()


async def _receive_object(call: PrefillCall, info: ObjectInfo) -> bytes:
    """The inline chunk announced last, checked frame by frame and as a whole."""
    data = bytearray()
    while len(data) < info.size_bytes:
        response = await _next(call)
        if response is None or response.WhichOneof("message") != "inline_frame":
            raise DataCorrupt(f"the stream broke off inside chunk {info.chunk_id.hex()}")
        frame = response.inline_frame
        _check_frame(frame, len(data), info.size_bytes)
        data += frame.data
    check_digest(data, info.digest, f"chunk {info.chunk_id.hex()}")
    return bytes(data)


class _LayerArrival:
    """Live KV coming in, one layer after another."""

    def __init__(self, shape: KvShape, num_tokens: int, first_position: int) -> None:
        self._shape = shape
        self._num_tokens = num_tokens
        self._first = first_position
        self._key_bytes = shape.key_bytes(num_tokens)
        self._data = bytearray(shape.layer_bytes(num_tokens))
        self._filled = 0
        self._next_layer = 0
        self._announced = False
        self.num_bytes = 0

    @property
    def complete(self) -> bool:
        """Whether every layer has come."""
        return self._next_layer == self._shape.num_layers

    def check(self, header: LiveKvHeader) -> None:
        """Raises `DataCorrupt` when what is announced is not what was asked for."""
        got = (
            KvShape(header.num_layers, header.num_kv_heads, header.head_dim, header.v_dim, header.dtype),
            header.first_position,
            header.num_tokens,
        )
        if got != (self._shape, self._first, self._num_tokens):
            raise DataCorrupt(f"live KV is announced as {got}, expected {self._shape} × {self._num_tokens} tokens")
        self._announced = True

    def take(self, layer: int, frame: Frame) -> int | None:
        """Adds a frame; the layer's index when that completes it."""
        if not self._announced or layer != self._next_layer or self.complete:
            raise DataCorrupt(f"a frame of layer {layer} came where layer {self._next_layer} was due")
        _check_frame(frame, self._filled, len(self._data))
        self._data[self._filled : self._filled + len(frame.data)] = frame.data
        self._filled += len(frame.data)
        self.num_bytes += len(frame.data)
        if self._filled < len(self._data):
            return None
        self._filled = 0
        self._next_layer += 1
        return layer

    def layer(self) -> tuple[memoryview, memoryview]:
        """K and V of the layer completed last; good until the next frame."""
        view = memoryview(self._data)
        return view[: self._key_bytes], view[self._key_bytes :]


def _check_frame(frame: Frame, offset: int, size: int) -> None:
    fits = frame.offset == offset and frame.data and offset + len(frame.data) <= size
    if not fits or digest(frame.data) != frame.digest:
        raise DataCorrupt(f"a frame at {frame.offset} is out of place or damaged (expected offset {offset} of {size})")
