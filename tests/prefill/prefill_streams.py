"""Prefill streams from a caller's side, message by message."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from tiny_cluster import TENANT, WAIT_S, Doc, ids_of

from spolia.v1.prefill_pb2 import (
    ChunkToCompile,
    CompileWork,
    ContextWork,
    LayerAck,
    LiveKvHeader,
    PrefillCancel,
    PrefillRequest,
    PrefillResponse,
    PrefillStart,
)
from spolia.v1.prefill_pb2_grpc import PrefillServiceStub
from spolia_core.digests import digest
from spolia_node.calls import call_errors
from spolia_prefill.node import PrefillNode


def start_of(node: PrefillNode, **fields: Any) -> PrefillStart:
    """A good start message; `fields` change it. Its work is among them."""
    good = {
        "request_id": "request",
        "tenant_id": TENANT,
        "fingerprint": node.engine.adapter.fingerprint,
        "accepted_codecs": ["raw"],
    }
    return PrefillStart(**{**good, **fields})


def compile_work(node: PrefillNode, documents: Sequence[Doc], inline: Sequence[Doc] = ()) -> CompileWork:
    """Documents to compile, some of them inline."""
    ids = ids_of(node.engine)
    return CompileWork(
        chunks=[ChunkToCompile(chunk_id=ids.local(d.token_ids), token_ids=d.token_ids) for d in documents],
        inline_chunks=[ids.local(d.token_ids) for d in inline],
    )


def context_work(token_ids: Sequence[int], num_cached: int = 0, **fields: Any) -> ContextWork:
    """A context to prefill."""
    good = {"token_ids": token_ids, "num_cached_tokens": num_cached, "accepts_slices": True}
    return ContextWork(**{**good, **fields})


@asynccontextmanager
async def streaming(
    node: PrefillNode, start: PrefillStart | None, timeout: float | None = WAIT_S
) -> AsyncIterator[Any]:
    """A stream that has been sent its start message; dropped at the end."""
    async with grpc.aio.insecure_channel(node.server.address) as channel:
        with call_errors("prefill"):
            call = PrefillServiceStub(channel).Prefill(None, timeout=timeout)
            try:
                if start is not None:
                    await call.write(PrefillRequest(start=start))
                yield call
            finally:
                call.cancel()


async def read_until(call: Any, kind: str) -> list[PrefillResponse]:
    """Responses up to the first of a kind, that one included. Fails when the stream ends before."""
    responses: list[PrefillResponse] = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
        if response.WhichOneof("message") == kind:
            return responses
    raise AssertionError(f"no {kind} in {[r.WhichOneof('message') for r in responses]}")


async def leave(call: Any, how: str) -> None:
    """Gives a stream up: "drop", "cancel" by message, or "half-close"; the latter two are answered with CANCELLED."""
    if how == "drop":
        call.cancel()
        return
    if how == "cancel":
        await call.write(PrefillRequest(cancel=PrefillCancel(reason="changed its mind")))
    else:
        await call.done_writing()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_until(call, "nothing")
    assert caught.value.code() is grpc.StatusCode.CANCELLED


async def acknowledge(call: Any, layers: Sequence[int], slice_index: int = 0) -> None:
    """Acknowledges layers of a slice."""
    for layer in layers:
        await call.write(PrefillRequest(ack=LayerAck(layer=layer, slice=slice_index)))


async def whole(node: PrefillNode, start: PrefillStart) -> list[PrefillResponse]:
    """All responses to a start message, every layer acknowledged as it ends. Raises what the node raised."""
    responses: list[PrefillResponse] = []
    shape = node.engine.adapter.kv_shape
    slices: list[int] = []
    num_received = 0
    async with streaming(node, start) as call:
        while (response := await call.read()) is not grpc.aio.EOF:
            responses.append(response)
            if response.HasField("live_header"):
                slices = slices_of(response)
            if response.HasField("layer_frame"):
                piece = response.layer_frame
                num_received += len(piece.frame.data)
                if num_received == shape.layer_bytes(slices[piece.slice]):
                    await acknowledge(call, [piece.layer], piece.slice)
                    num_received = 0
    return responses


def slices_of(header: PrefillResponse) -> list[int]:
    """Tokens of each slice that a header announces."""
    return list(header.live_header.slice_tokens) or [header.live_header.num_tokens]


def layers_of(responses: Sequence[PrefillResponse]) -> list[bytes]:
    """Bytes of each layer over all slices; slices and layers in order, offsets without gaps, digests right."""
    header = next(response for response in responses if response.HasField("live_header"))
    slices, num_layers = slices_of(header), header.live_header.num_layers
    pieces: list[bytearray] = []
    for response in responses:
        if response.HasField("layer_frame"):
            piece = response.layer_frame
            if piece.frame.offset == 0:
                pieces.append(bytearray())
            assert (piece.slice, piece.layer) == divmod(len(pieces) - 1, num_layers)
            assert piece.frame.offset == len(pieces[-1])
            assert digest(piece.frame.data) == piece.frame.digest
            pieces[-1] += piece.frame.data
    assert len(pieces) == len(slices) * num_layers
    return [_joined(pieces[layer::num_layers], slices, header.live_header) for layer in range(num_layers)]


def _joined(pieces: Sequence[bytearray], slices: Sequence[int], header: LiveKvHeader) -> bytes:
    """One layer of consecutive slices, K then V of all tokens; float32."""
    keys, values = [], []
    for piece, num_tokens in zip(pieces, slices, strict=True):
        numbers = np.frombuffer(piece, np.float32)
        num_key = header.num_kv_heads * num_tokens * header.head_dim
        keys.append(numbers[:num_key].reshape(header.num_kv_heads, num_tokens, header.head_dim))
        values.append(numbers[num_key:].reshape(header.num_kv_heads, num_tokens, header.v_dim))
    return np.concatenate(keys, 1).tobytes() + np.concatenate(values, 1).tobytes()


def token_after(node: PrefillNode, responses: Sequence[PrefillResponse]) -> int:
    """The likeliest token after the context whose last hidden state a whole stream brought."""
    adapter = node.engine.adapter
    return int(adapter.logits(adapter.hidden_from_bytes(responses[-2].last_hidden.data)[None])[0].argmax())
