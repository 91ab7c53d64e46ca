"""Live KV on its way to a decode node, layer by layer, held until acknowledged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from spolia.v1.common_pb2 import Frame
from spolia.v1.prefill_pb2 import LayerFrame, LiveKvHeader, PrefillResponse
from spolia_core.chunk_object import KvShape
from spolia_core.digests import frames
from spolia_core.errors import Cancelled, InvalidRequest, Unavailable
from spolia_engine.kv_bytes import layer_of_run
from spolia_engine.run import Run


class Acknowledgements:
    """Which layers the other side has. Fed by the stream's reader, awaited by its writer."""

    def __init__(self, num_layers: int, lease_s: float) -> None:
        self._waiting = set(range(num_layers))
        self._lease_s = lease_s
        self._changed = asyncio.Event()

    def acknowledge(self, layer: int) -> None:
        """A layer has arrived. Raises `InvalidRequest` for one that does not exist or was acknowledged before."""
        if layer not in self._waiting:
            raise InvalidRequest(
                f"layer {layer} is not waiting to be acknowledged", field="ack.layer", actual=str(layer)
            )
        self._waiting.discard(layer)
        self._changed.set()

    @property
    def complete(self) -> bool:
        """Whether every layer is acknowledged."""
        return not self._waiting

    async def wait_all(self) -> None:
        """Returns when every layer is acknowledged. Raises `Unavailable` when a lease passes without a new one."""
        while self._waiting:
            self._changed.clear()
            try:
                # Not wait_for, which before Python 3.12 drops a cancel that comes with the event.
                async with asyncio.timeout(self._lease_s):
                    await self._changed.wait()
            except TimeoutError:
                raise Unavailable(
                    f"{len(self._waiting)} layers were not acknowledged within {self._lease_s} s; their KV is freed",
                    field="ack",
                    limit=f"{self._lease_s} s",
                ) from None


class LayerStream:
    """Sends layers as the engine finishes them. Made in the event loop, told by the engine's thread."""

    def __init__(self, shape: KvShape, first_position: int, num_tokens: int) -> None:
        self._shape = shape
        self._first = first_position
        self._num_tokens = num_tokens
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Queue[tuple[int, Sequence[Run]]] = asyncio.Queue()
        self._closed = False

    def close(self) -> None:
        """Nobody takes layers any more; the pass ends at its next one."""
        self._closed = True

    def layer_done(self, layer: int, runs: Sequence[Run]) -> None:
        """`layer` of `runs`, which together hold the live tokens in order, is complete. Engine's thread.

        Raises `Cancelled` once the stream is closed.
        """
        if self._closed:
            raise Cancelled(f"nobody waits for layer {layer}")
        self._loop.call_soon_threadsafe(self._done.put_nowait, (layer, runs))

    def header(self) -> PrefillResponse:
        """What goes before the first layer."""
        shape = self._shape
        return PrefillResponse(
            live_header=LiveKvHeader(
                num_layers=shape.num_layers,
                num_kv_heads=shape.num_kv_heads,
                head_dim=shape.head_dim,
                v_dim=shape.v_dim,
                dtype=shape.dtype,
                first_position=self._first,
                num_tokens=self._num_tokens,
            )
        )

    async def frames(self, working: asyncio.Future[Any]) -> AsyncIterator[PrefillResponse]:
        """Every layer's frames, in order, while `working` computes them; raises what `working` raises."""
        for _ in range(self._shape.num_layers):
            layer, runs = await self._next(working)
            for offset, piece, piece_digest in frames(layer_bytes(runs, layer, self._shape, self._num_tokens)):
                frame = Frame(offset=offset, data=piece, digest=piece_digest)
                yield PrefillResponse(layer_frame=LayerFrame(layer=layer, frame=frame))

    async def _next(self, working: asyncio.Future[Any]) -> tuple[int, Sequence[Run]]:
        getting = asyncio.ensure_future(self._done.get())
        try:
            waited: set[asyncio.Future[Any]] = {getting, working}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not getting.done() and working.done():
                working.result()  # raises when the pass failed; else the layer's notice is about to come
            return await getting
        finally:
            getting.cancel()


def layer_bytes(runs: Sequence[Run], layer: int, shape: KvShape, num_tokens: int) -> bytes:
    """K then V of one layer over consecutive runs, each [num_kv_heads, num_tokens, width]."""
    parts = [layer_of_run(run, layer) for run in runs]
    keys = _join_heads([key for key, _ in parts], shape.num_kv_heads)
    values = _join_heads([value for _, value in parts], shape.num_kv_heads)
    assert len(keys) == shape.key_bytes(num_tokens), (len(keys), num_tokens)
    return keys + values


def _join_heads(pieces: Sequence[bytes], num_heads: int) -> bytes:
    """Joins [num_heads, tokens_i, width] pieces along tokens."""
    if len(pieces) == 1:
        return pieces[0]
    sizes = [len(piece) // num_heads for piece in pieces]
    return b"".join(
        piece[head * size : (head + 1) * size]
        for head in range(num_heads)
        for piece, size in zip(pieces, sizes, strict=True)
    )
