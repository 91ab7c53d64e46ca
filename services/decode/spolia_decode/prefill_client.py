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
    LayerFrame,
    LinkWork,
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
from spolia_node.tracing import trace_metadata

PrefillCall = grpc.aio.StreamStreamCall[PrefillRequest, PrefillResponse]
END_TIMEOUT_S = 0.5
"""How long the end of a stream may take once its work is done."""

OnLayer = Callable[[int, int, int, memoryview, memoryview], None]
"""Takes a layer of a slice: index of the slice's first token among those handed off, number of its tokens, the layer,
and the K and V bytes, checked, each [num_kv_heads, num_tokens, width]."""


@dataclass(frozen=True, slots=True)
class CompiledChunk:
    """A chunk that is ready: in the store, or here as a checked object in `data`."""

    chunk_id: bytes
    outcome: ChunkOutcome.ValueType
    num_computed_tokens: int
    data: bytes | None


@dataclass(frozen=True, slots=True)
class HandedOff:
    """What a prefill node computed and handed over, of an exact context or of a linked one."""

    last_hidden: bytes
    """Of the last token, in the model's dtype; checked against its digest."""
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
        """Has an exact context prefilled. Each layer of each slice is checked, given to `on_layer`, then acknowledged.

        Raises `DataCorrupt` for bytes that do not match, and what `compile` raises.
        """
        start.context.CopyFrom(work)
        start.context.accepts_slices = True
        arrival = _LayerArrival(shape, len(work.token_ids) - work.num_cached_tokens, work.num_cached_tokens)
        return await self._hand_off(address, start, arrival, on_layer, deadline)

    async def link(
        self, address: str, start: PrefillStart, work: LinkWork, shape: KvShape, on_layer: OnLayer, deadline: Deadline
    ) -> HandedOff:
        """Has rows computed over reused chunks; `on_layer` counts tokens in rows. Otherwise as `prefill`."""
        start.link.CopyFrom(work)
        arrival = _LayerArrival(shape, sum(row.num_tokens for row in work.rows), 0)
        return await self._hand_off(address, start, arrival, on_layer, deadline)

    async def _hand_off(
        self, address: str, start: PrefillStart, arrival: _LayerArrival, on_layer: OnLayer, deadline: Deadline
    ) -> HandedOff:
        last_hidden: bytes | None = None
        async with self._calling(address, start, deadline) as call:
            while (response := await _next(call)) is not None:
                match response.WhichOneof("message"):
                    case "live_header":
                        arrival.check(response.live_header)
                    case "layer_frame":
                        done = arrival.take(response.layer_frame)
                        if done is not None:
                            on_layer(done.start, done.num_tokens, done.layer, done.key, done.value)
                            ack = LayerAck(layer=done.layer, slice=done.slice_index)
                            await _write(call, PrefillRequest(ack=ack))
                    case "last_hidden":
                        frame = response.last_hidden
                        check_digest(frame.data, frame.digest, "the last hidden state")
                        last_hidden = frame.data
                    case "done" if last_hidden is not None and arrival.complete:
                        await _end(call)
                        return HandedOff(
                            last_hidden,
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
            call: PrefillCall = PrefillServiceStub(self._channels.get(address, "prefill")).Prefill(
                None, timeout=deadline.remaining(), metadata=trace_metadata()
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


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer of a slice that came whole. Its bytes are good until the next frame."""

    slice_index: int
    layer: int
    start: int
    num_tokens: int
    key: memoryview
    value: memoryview


class _LayerArrival:
    """Live KV coming in: slice by slice, in each one layer after another."""

    def __init__(self, shape: KvShape, num_tokens: int, first_position: int) -> None:
        self._shape = shape
        self._num_tokens = num_tokens
        self._first = first_position
        self._slices: tuple[int, ...] = ()
        self._slice = 0
        self._layer = 0
        self._start = 0
        self._data = bytearray()
        self._filled = 0
        self.num_bytes = 0

    @property
    def complete(self) -> bool:
        """Whether every layer of every slice has come."""
        return bool(self._slices) and self._slice == len(self._slices)

    def check(self, header: LiveKvHeader) -> None:
        """Raises `DataCorrupt` when what is announced is not what was asked for, or was announced before."""
        got = (
            KvShape(header.num_layers, header.num_kv_heads, header.head_dim, header.v_dim, header.dtype),
            header.first_position,
            header.num_tokens,
        )
        if got != (self._shape, self._first, self._num_tokens):
            raise DataCorrupt(f"live KV is announced as {got}, expected {self._shape} × {self._num_tokens} tokens")
        slices = tuple(header.slice_tokens) or (header.num_tokens,)
        if self._slices or not all(slices) or sum(slices) != self._num_tokens:
            raise DataCorrupt(f"live KV of {self._num_tokens} tokens is announced in slices of {slices}")
        self._slices = slices
        self._data = bytearray(self._shape.layer_bytes(max(slices)))

    def take(self, piece: LayerFrame) -> _Layer | None:
        """Adds a frame; what it completes, if anything."""
        if not self._slices or self.complete or (piece.slice, piece.layer) != (self._slice, self._layer):
            raise DataCorrupt(
                f"a frame of layer {piece.layer} of slice {piece.slice} came "
                f"where layer {self._layer} of slice {self._slice} of {len(self._slices)} was due"
            )
        num_tokens = self._slices[self._slice]
        size = self._shape.layer_bytes(num_tokens)
        data = piece.frame.data
        _check_frame(piece.frame, self._filled, size)
        self._data[self._filled : self._filled + len(data)] = data
        self._filled += len(data)
        self.num_bytes += len(data)
        if self._filled < size:
            return None
        view, key_bytes = memoryview(self._data), self._shape.key_bytes(num_tokens)
        done = _Layer(self._slice, self._layer, self._start, num_tokens, view[:key_bytes], view[key_bytes:size])
        self._next()
        return done

    def _next(self) -> None:
        self._filled = 0
        self._layer += 1
        if self._layer == self._shape.num_layers:
            self._layer = 0
            self._start += self._slices[self._slice]
            self._slice += 1


def _check_frame(frame: Frame, offset: int, size: int) -> None:
    fits = frame.offset == offset and frame.data and offset + len(frame.data) <= size
    if not fits or digest(frame.data) != frame.digest:
        raise DataCorrupt(f"a frame at {frame.offset} is out of place or damaged (expected offset {offset} of {size})")
